"""Modules whose own parameters train in full size beside the adapters, `lora.train_also`: norms, embeddings, a head.

A module says so itself, in an attribute that a pipeline stage's copy, sharding and wrappers leave alone. Its parameters
are found by it whenever they are asked for: parallelism replaces them.
"""

from collections.abc import Iterable, Sequence

import torch.nn as nn

from lora_converter.names import owners, plain_modules
from lora_converter.targets import ALL_LINEAR, matches

_FQN = "lora_trained_fqn"


def select_trained(names: Iterable[str], patterns: Sequence[str], *, strict: bool = True) -> list[str]:
    """Which modules `lora.train_also` means.

    Args:
        names: Of modules with parameters of their own.
        patterns: As in target_modules, over all modules.
        strict: A pattern that matches nothing is an error.

    Raises:
        ValueError: A pattern matches nothing.
    """
    names, selected = list(dict.fromkeys(names)), set()
    for pattern in patterns:
        hits = {name for name in names if pattern != ALL_LINEAR and matches(pattern, name)}
        if strict and not hits:
            last = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(
                f"lora.train_also: {pattern!r} matches no module of the model; those with weights of their own are "
                f"{last}."
            )
        selected |= hits
    return [name for name in names if name in selected]


def modules_with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> module, of those below `model` that own parameters."""
    return {name: module for name, module in plain_modules(model) if name and any(True for _ in _own(module))}


def mark_trained(model: nn.Module, fqns: Iterable[str]) -> None:
    """Marks modules whose own parameters train."""
    modules = dict(plain_modules(model))
    for fqn in fqns:
        setattr(modules[fqn], _FQN, fqn)


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """FQN -> module, of those whose own parameters train, also in a pipeline stage or a wrapped model."""
    return {vars(module)[_FQN]: module for module in model.modules() if _FQN in vars(module)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those modules; one that is tied comes once, under the first module's name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for fqn, module in trained_modules(model).items():
        for name, param in _own(module):
            found.setdefault(id(param), (f"{fqn}.{name}", param))
    return dict(found.values())


def tied_to_trained(model: nn.Module) -> dict[str, list[str]]:
    """Name of a trained parameter -> the other names that the same parameter has."""
    names = {id(param): name for name, param in trained_parameters(model).items()}
    found: dict[str, list[str]] = {}
    for other, param in owners(model):
        if id(param) in names and other != names[id(param)]:
            found.setdefault(names[id(param)], []).append(other)
    return found


def unmark_trained(model: nn.Module) -> None:
    """Makes them modules like any other, frozen; what they have learned stays."""
    for param in trained_parameters(model).values():
        param.requires_grad_(False)
    for module in trained_modules(model).values():
        delattr(module, _FQN)


def _own(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)
