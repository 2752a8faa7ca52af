"""A module's name is the plain model's, whatever it has been wrapped in since. One home for that.

torch.compile, activation checkpointing, FSDP1 and DDP put a wrapper around a module, which then has a name with
`_orig_mod`, `_checkpoint_wrapped_module`, `_fsdp_wrapped_module` or `module` in it.
"""

import hashlib
from collections.abc import Container, Iterator

import torch.nn as nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def without_wrappers(name: str) -> str:
    """A name or key without what wrappers put into it, but for DDP's `module`, which a model may have itself."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def known_key(key: str, known: Container[str]) -> str:
    """The one of `known` that a state dict's key is, without what wrappers have put into it; else the key itself."""
    plain = without_wrappers(key)
    while plain not in known and plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return plain if plain in known else key


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` under plain names. A wrapper has the name of what it wraps, and comes before it."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        is_ddp = isinstance(module, DataParallel | DistributedDataParallel)
        for part, child in module.named_children():
            is_wrapped = part in _WRAPPED or (is_ddp and part == "module")
            yield from walk(child, name if is_wrapped else f"{name}.{part}" if name else part)

    return walk(model, "")


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` under plain names: a shared parameter once, under its first name."""
    seen: set[int] = set()
    for name, param in owners(model):
        if id(param) not in seen:
            seen.add(id(param))
            yield name, param


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every name of every parameter, under plain names: a shared parameter comes as often as it is owned."""
    for module_name, module in plain_modules(model):
        for name, param in module.named_parameters(recurse=False):
            yield f"{module_name}.{name}" if module_name else name, param


def stable_hash(text: str) -> int:
    """63 bits of SHA-256: the same on every rank, machine and Python, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
