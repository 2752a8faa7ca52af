"""Which base an adapter belongs to: a fingerprint of the frozen weights that is the same on every layout.

Of each parameter two sums over the bits of its elements as bf16, in whatever order they stand: shards add up, and a
base stored in fp32 has the fingerprint of one in bf16, and a packed one that of what was packed. One pass over the
weights, and one small all-reduce per mesh dim that shards them.
"""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from lora_converter.adapted import adapter_parameters
from lora_converter.names import plain_parameters
from lora_converter.new_tokens import grown_weights
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_module import packed_formats
from lora_converter.tensors import local_part, reshard

_ELEMENTS_AT_A_TIME = {"cpu": 2**17, "cuda": 2**20}
"""By kind of device: few enough for a CPU's cache, enough to make launches of kernels cheap, and few enough for
squares, of 30 bits, to add up exactly in the 53 bits of a float64."""

Sums = dict[str, tuple[int, int]]
"""Name and shape of a parameter -> sum and sum of squares of its elements' bits, modulo 2^64."""


def base_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's parameters without the adapters. On sharded models call it on all ranks.

    A pipeline stage has the fingerprint of its own layers; `fingerprint` takes the sums of all stages.
    """
    return fingerprint(base_sums(model))


def fingerprint(sums: Sums) -> str:
    """16 hexadecimal digits of what `base_sums` found."""
    text = "\n".join(f"{name} {list(sums[name])}" for name in sorted(sums))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def base_sums(
    model: nn.Module,
    *,
    canonical_name: Callable[[str], str] = str,
    before_packing: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Sums:
    """What the fingerprint is made of, for this model or pipeline stage. On sharded models call it on all ranks.

    Args:
        canonical_name: A parameter's name in this model -> its name on any host; the same if left out.
        before_packing: Plain name of a packed weight -> what `sums_of` found in this rank's part of it before. One that
            is not named counts as what it stands for.
    """
    reshard(model)
    adapters = {id(param) for param in adapter_parameters(model).values()}
    base = {name: param for name, param in plain_parameters(model) if id(param) not in adapters}
    if not base:
        return {}
    forms, grown = packed_formats(model), grown_weights(model)

    def own_sums(name: str) -> torch.Tensor:
        if name in before_packing:
            return before_packing[name]
        own = local_part(base[name])
        return sums_of(FORMATS[forms[name]].unpack(own, torch.bfloat16) if name in forms else own)

    def shape(name: str) -> tuple[int, ...]:
        own = tuple(base[name].shape)
        if name in grown:  # its zeros add nothing to the sums
            return (grown[name], *own[1:])
        return FORMATS[forms[name]].weight_shape(own) if name in forms else own

    sums = torch.stack([own_sums(name) for name in base])
    _complete(sums, list(base.values()))
    names = [f"{canonical_name(name)}{shape(name)}" for name in base]
    return {name: (int(total), int(squares)) for name, (total, squares) in zip(names, sums.tolist(), strict=True)}


def sums_of(values: torch.Tensor) -> torch.Tensor:
    """The two sums of a tensor that is whole or a shard: (2), int64, on its device."""
    found = torch.zeros(2, dtype=torch.int64, device=values.device)
    at_a_time = _ELEMENTS_AT_A_TIME.get(values.device.type, 2**20)
    for part in values.flatten().split(at_a_time):
        bits = part.to(torch.bfloat16).view(torch.int16).to(torch.float64)
        found += torch.stack([bits.sum(), bits @ bits]).to(torch.int64)
    return found


def _complete(sums: torch.Tensor, params: list[nn.Parameter]) -> None:
    """Adds up, in place, what ranks have found of their shards of each parameter."""
    layouts: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if isinstance(param, DTensor):
            layouts.setdefault((param.device_mesh, param.placements), []).append(index)
    for (mesh, placements), members in layouts.items():
        table = sums[members].to(mesh.device_type)
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():
                dist.all_reduce(table, group=mesh.get_group(dim))
        sums[members] = table.to(sums.device)
