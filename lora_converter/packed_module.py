"""What modules with packed weights share: `packed_linear.py` and `packed_experts.py` are the two kinds.

The weights are parameters of uint8 under the names that they had. Whoever asks for their shapes or sizes means those of
the weights, and is answered here.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from lora_converter.names import plain_parameters
from lora_converter.packed_formats import FORMATS
from lora_converter.swap import reduced


class PackedModule(nn.Module):
    """A module whose weights are packed, or may be. A kind derives from it; its class is put on by swapping.

    Attributes:
        packed_format: The name of their format; empty if they are not packed.
        packed_fqn: Name of the module in the whole model.
    """

    packed_format: str = ""
    packed_fqn: str

    def packed_names(self) -> tuple[str, ...]:
        """The parameters that are packed."""
        raise NotImplementedError

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Of a weight as it is unpacked, (..., out, in)."""
        shape = tuple(self.get_parameter(name).shape)
        return FORMATS[self.packed_format].weight_shape(shape) if name in self.packed_names() else shape

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s.

        Raises:
            ValueError: See `check_blocks`.
        """
        if self.packed_format and param is not None and name in self.packed_names():
            check_blocks(f"{self.packed_fqn}.{name}", param, form=self.packed_format)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        told = f"weight={self.packed_format}" if self.packed_format else ""
        return ", ".join(filter(None, [super().extra_repr(), told]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, super().__reduce_ex__(2))


def packed_weights(model: nn.Module) -> Iterator[tuple[PackedModule, str]]:
    """The packed weights of a model: whose each is, and its name there."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            yield from ((module, name) for name in module.packed_names())


def packed_formats(model: nn.Module) -> dict[str, str]:
    """Plain name of each packed weight of a model -> the name of its format."""
    forms = {id(module.get_parameter(name)): module.packed_format for module, name in packed_weights(model)}
    return {name: forms[id(param)] for name, param in plain_parameters(model) if id(param) in forms}


def count_elements(model: nn.Module, params: Iterable[nn.Parameter]) -> int:
    """Elements of parameters of a model, sharded or not: of a packed one those of its weight, and not its bytes."""
    shapes = {id(module.get_parameter(name)): module.weight_shape(name) for module, name in packed_weights(model)}
    return sum(math.prod(shapes.get(id(param), param.shape)) for param in params)


@contextmanager
def shown_unpacked(model: nn.Module) -> Iterator[None]:
    """For what reads shapes and computes nothing: packed weights are on meta, of the shapes of the weights."""
    packed = [(module, name, module.get_parameter(name)) for module, name in packed_weights(model)]
    try:
        for module, name, _ in packed:
            dense = torch.empty(module.weight_shape(name), device="meta")
            module._parameters[name] = nn.Parameter(dense, requires_grad=False)
        yield
    finally:
        for module, name, param in packed:
            module._parameters[name] = param


def check_blocks(name: str, packed: torch.Tensor, *, form: str) -> None:
    """Refuses a packed weight whose blocks are sharded over a mesh that does not divide them.

    A rank's columns would then be others than its columns of the input.

    Args:
        packed: (..., out_features, blocks, bytes).

    Raises:
        ValueError: It is one; the message has the degrees that would do.
    """
    if not isinstance(packed, DTensor):
        return
    blocks, size = packed.shape[-2], FORMATS[form].block
    degree = math.prod(_degrees(packed, packed.ndim - 2))
    if blocks % degree:
        fitting = ", ".join(str(d) for d in range(1, blocks + 1) if blocks % d == 0)
        raise ValueError(
            f"{name} is packed ({form}): its {blocks * size} columns are {blocks} blocks of {size}, which tensor "
            f"parallelism of {degree} does not divide. Degrees that do: {fitting}."
        )


def _degrees(value: DTensor, dim: int) -> Iterable[int]:
    sizes = (value.device_mesh.size(i) for i in range(value.device_mesh.ndim))
    return (size for size, p in zip(sizes, value.placements, strict=True) if getattr(p, "dim", None) == dim)
