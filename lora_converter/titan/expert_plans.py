"""torchtitan's plans for experts make parameters that train of every weight, which bytes cannot be."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_converter.packed_module import PackedModule

Partition = Callable[[str, nn.Module, DeviceMesh], None]


def place_packed(distribute_module: Callable[..., Any]) -> Callable[..., Any]:
    """`distribute_module`, for plans that may be given packed weights: they are placed as the plan places others."""

    @functools.wraps(distribute_module)
    def distribute(
        module: nn.Module, mesh: DeviceMesh, partition_fn: Partition | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if partition_fn is not None:
            partition_fn = functools.partial(_partition, partition_fn)
        return distribute_module(module, mesh, partition_fn, *args, **kwargs)

    return distribute


def _partition(plan: Partition, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Runs a plan on stand-ins that could train, of the packed weights' shapes, and places these after them."""
    names = module.packed_names() if isinstance(module, PackedModule) else ()
    packed = {weight: module.get_parameter(weight).detach() for weight in names}
    for weight, value in packed.items():
        module._parameters[weight] = nn.Parameter(torch.empty(value.shape, device="meta"))
    try:
        plan(name, module, mesh)
    finally:
        for weight, value in packed.items():
            placed = module.get_parameter(weight)
            if isinstance(placed, DTensor):
                value = distribute_tensor(value, placed.device_mesh, placed.placements)
            module._parameters[weight] = nn.Parameter(value, requires_grad=False)
