"""Adapters from a training process to others: packages of safetensors bytes, and what receives them. No pickle.

    package    the adapters' tensors; beside them, in the header, the settings of each layer, a version, the
               fingerprint of the base and a checksum over all of it
    receivers  `AdapterReceiver` loads a package into a model with adapters of its own;
               `IncrementReceiver` adds the increments s · B A to the weights of a plain model

A package that is damaged, not newer than the last one, of another base or of another shape is refused whole: the
receiver stays as it was. Increments are added to the original weights each time, never to the last result, so that
updates do not drift. The base itself is never sent.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load, save

from lora_converter.config import scaling
from lora_converter.files import write_whole
from lora_converter.fingerprint import base_fingerprint
from lora_converter.increments import Increment, increments_of
from lora_converter.names import owners
from lora_converter.new_tokens import token_rows
from lora_converter.shared import check_not_shared
from lora_converter.state_dict import adapter_configs, adapter_state_dict, load_adapter_state_dict
from lora_converter.tensors import local_part, reshard
from lora_converter.updates import add_updates, low_rank_updates, on_all_ranks

_FIELD, _FORMAT = "lora_converter", 1


@dataclass(frozen=True)
class Package:
    """What a trainer sends.

    Attributes:
        version: Counts up with every update.
        base: Fingerprint of the base weights, see `base_fingerprint`.
        scalings: FQN of each adapted module -> factor of its B A.
        tensors: `<fqn>.lora_a.weight` (rank, in_features) and `<fqn>.lora_b.weight` (out_features, rank) of linears,
            `<fqn>.<weight>_lora_a` and `<fqn>.<weight>_lora_b` of routed experts, see `experts.py`.
        tokens: Module -> of which tokens its `lora_token_rows` are; see `token_rows.py`.
    """

    version: int
    base: str
    scalings: dict[str, float]
    tensors: dict[str, torch.Tensor]
    tokens: dict[str, list[int]] = field(default_factory=dict)


def pack(model: nn.Module, *, version: int, base: str, dtype: torch.dtype | None = None) -> bytes:
    """A package of a model's adapters. A collective on sharded models: call it on all ranks, each gets the bytes.

    Args:
        version: Counts up with every update.
        base: `base_fingerprint(model)`, or any other name that sender and receivers agree on.
        dtype: Of the tensors sent; the adapters' own if left out, and of those with `init`, whose difference to what
            they began at would be lost in its rounding.

    Raises:
        ValueError: The model has no adapters.
    """
    settings = adapter_configs(model)
    exact = tuple(f"{fqn}." for fqn, config in settings.items() if config.init)
    tensors = {
        name: value.to("cpu", None if name.startswith(exact) else dtype).contiguous()
        for name, value in adapter_state_dict(model).items()
    }
    configs = {
        fqn: {"rank": config.rank, "alpha": config.alpha, "use_rslora": config.use_rslora, "dropout": config.dropout}
        for fqn, config in settings.items()
    }
    header: dict[str, Any] = {"format": _FORMAT, "version": version, "base": base, "configs": configs}
    if tokens := _tokens_of(model):
        header["tokens"] = tokens
    header["sha256"] = _checksum(header, tensors)
    return save(tensors, metadata={_FIELD: json.dumps(header)})


def unpack(data: bytes) -> Package:
    """Reads and checks a package.

    Raises:
        ValueError: It is damaged, or no package.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FIELD])
        checksum = header.pop("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"This is no package of adapters, or a damaged one ({e!r}). Have it sent again.") from None
    if checksum != _checksum(header, tensors):
        raise ValueError("The package is damaged: its checksum is another. Have it sent again.")
    if header["format"] != _FORMAT:
        raise ValueError(f"The package has format {header['format']}; this version of lora_converter reads {_FORMAT}.")
    scalings = {fqn: scaling(c["rank"], c["alpha"], c["use_rslora"]) for fqn, c in header["configs"].items()}
    return Package(header["version"], header["base"], scalings, tensors, header.get("tokens", {}))


class _Receiver:
    """Takes packages in order. `version` is that of the last one, -1 before the first.

    Args:
        model: Where they go to. Sharded or not; then every rank is given the same bytes.
        base: What the packages' `base` must be; `base_fingerprint(model)`, of the weights as they are now, if left out.
    """

    def __init__(self, model: nn.Module, *, base: str | None = None):
        self.model = model
        self.base = base_fingerprint(model) if base is None else base
        self.version = -1

    def receive(self, data: bytes) -> int:
        """Applies a package.

        Returns:
            Its version.

        Raises:
            ValueError: It is damaged, stale, of another base, or does not fit the model, which is then as it was.
        """
        package = unpack(data)
        if package.base != self.base:
            raise ValueError(f"The package is for base {package.base!r}, this model's is {self.base!r}.")
        if package.version <= self.version:
            raise ValueError(f"The package has version {package.version}, the model version {self.version} already.")
        self._apply(package)
        self.version = package.version
        return self.version

    def _apply(self, package: Package) -> None:
        """Checks that the package fits, then writes it."""
        raise NotImplementedError


class AdapterReceiver(_Receiver):
    """A model with adapters on the same modules as the sender's, of any layout."""

    def _apply(self, package: Package) -> None:
        ours = {fqn: config.scaling for fqn, config in adapter_configs(self.model).items()}
        if ours != package.scalings:
            other = sorted(f for f in ours.keys() | package.scalings.keys() if ours.get(f) != package.scalings.get(f))
            raise ValueError(f"The package's linears or scalings are not this model's: {', '.join(other)}.")
        if (tokens := _tokens_of(self.model)) != package.tokens:
            raise ValueError(f"The package's rows are of the tokens {package.tokens}, and this model's of {tokens}.")
        load_adapter_state_dict(self.model, package.tensors)


class IncrementReceiver(_Receiver):
    """A plain model with the sender's names, of any layout: its weights become W + s · B A, in fp32 and rounded once.

    The original weights of adapted modules are kept beside, from their first update on. Of increments there is never
    more than one linear's or expert's part on this rank.
    """

    def __init__(self, model: nn.Module, *, base: str | None = None):
        super().__init__(model, base=base)
        self._originals: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _apply(self, package: Package) -> None:
        reshard(self.model)
        increments = increments_of(package.tensors, package.scalings, self.model)
        check_not_shared(self.model, increments)
        weights = dict(owners(self.model))
        for name, increment in increments.items():
            if not on_all_ranks(self._add(increment, name, weights[name]), weights[name]):
                raise ValueError(f"{name} would hold nan or inf with the package's increment.")
        for name in self._originals.keys() - increments.keys():
            local_part(weights[name]).copy_(self._originals.pop(name))
        for name, increment in increments.items():
            local = local_part(weights[name])
            if name not in self._originals:
                self._originals[name] = local.clone()
            self._add(increment, name, weights[name], out=local)

    def _add(self, increment: Increment, name: str, weight: nn.Parameter, out: torch.Tensor | None = None) -> bool:
        """See `add_updates`: to the original weight, never to the last sum."""
        updates = low_rank_updates(increment.left, increment.right, weight, scaling=increment.scaling)
        return add_updates(self._originals.get(name, local_part(weight)), updates, out=out)


def broadcast(data: bytes | None, *, group: dist.ProcessGroup | None = None, group_src: int = 0) -> bytes:
    """Sends a package to all ranks of a process group: those that trained and those that receive.

    Args:
        data: The package on the sending rank; what others give is ignored.
        group_src: The sending rank, counted in the group.
    """
    sends = dist.get_rank(group) == group_src
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    size = torch.tensor([len(data) if sends and data is not None else 0], device=device)
    dist.broadcast(size, group=group, group_src=group_src)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    if sends and data is not None:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, group=group, group_src=group_src)
    return buffer.cpu().numpy().tobytes()


def write_file(path: str | Path, data: bytes) -> None:
    """Puts a package where another process polls for it: a reader sees the old one or the new one, never a part."""
    write_whole(path, data)


def _tokens_of(model: nn.Module) -> dict[str, list[int]]:
    return {module.lora_fqn: [*module.lora_token_ids] for module in token_rows(model).values()}


def _checksum(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
