"""A linear whose frozen weight is packed, made by swapping the class of the linear that is there.

The module keeps its name and place, its parameter `weight` becomes uint8, (out_features, blocks, bytes), and its
forward unpacks it (`packed_ops.py`). An adapter goes on top as on any linear, and then unpacks it itself.

Under tensor parallelism the weight is sharded by rows or by blocks, as the dense one by rows or columns. Each rank's
part is a packed weight by itself, so everything is computed on local parts.
"""

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Shard

from lora_converter.packed_formats import FORMATS
from lora_converter.packed_module import PackedModule
from lora_converter.packed_ops import packed_linear
from lora_converter.swap import check_forward_is_called, follow_hook, swap_class
from lora_converter.tensor_parallel import local_bias, local_input, local_output, output_on_mesh, rows_on_mesh
from lora_converter.tensors import local_part


class PackedLinear(PackedModule):
    """What a linear's class gains: a packed weight. Made by `pack_linear` alone."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        weight, bias, form = self.weight, self.bias, self.packed_format
        if not isinstance(weight, DTensor):
            return packed_linear(input, weight, bias, form=form)
        mesh, placement = weight.device_mesh, weight.placements[0]
        if not isinstance(placement, Shard):
            x = rows_on_mesh(input)
            own = x.to_local(grad_placements=x.placements)
            return output_on_mesh(packed_linear(own, local_part(weight), _local(bias), form=form), x)
        column_wise = placement.dim == 0
        out = packed_linear(
            local_input(input, mesh, column_wise=column_wise),
            local_part(weight),
            local_bias(bias, mesh, column_wise=column_wise),
            form=form,
        )
        return local_output(out, mesh, column_wise=column_wise, out_features=self.out_features)

    def packed_names(self) -> tuple[str, ...]:
        return ("weight",)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """As `nn.Module`'s, which tells of shapes alone where a weight is not packed, or packed otherwise."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        found, error_msgs = state_dict.get(f"{prefix}weight"), others[-1]
        if found is not None and found.shape != self.weight.shape:
            error_msgs.append(
                f"{prefix}weight is packed ({self.packed_format}), and a tensor of shape {tuple(found.shape)} is not. "
                "Load a dense weight before pack_linear packs it."
            )

    def reset_parameters(self) -> None:
        """Nothing: a packed weight is loaded."""


def pack_linear(linear: nn.Linear, *, form: str, fqn: str = "linear") -> PackedLinear:
    """Packs the weight of a linear and turns it into a `PackedLinear`, in place. The weight is frozen from then on.

    Args:
        linear: On any device; on meta the weight gets its shape alone.
        form: The name of a packed format.
        fqn: Its name in the whole model.

    Raises:
        ValueError: There is no such format, its blocks do not fill `in_features`, the weight is not finite or no
            parameter, or the linear has a product of its own. The linear is then as it was.
    """
    if form not in FORMATS:
        raise ValueError(f"{fqn} is not packed: {form!r} is no packed format; the formats are {', '.join(FORMATS)}.")
    check_forward_is_called(fqn, linear)
    if obstacle := what_keeps_from_packing(linear):
        raise ValueError(f"{fqn} is not packed: {obstacle}.")
    weight = nn.Parameter(FORMATS[form].pack(linear.weight.detach()), requires_grad=False)
    packed = swap_class(linear, PackedLinear)
    follow_hook(packed)
    packed.packed_format, packed.packed_fqn = form, fqn
    packed.weight = weight
    return packed


def what_keeps_from_packing(linear: nn.Module) -> str:
    """Why a linear cannot be packed, whatever its values; empty if it can."""
    if type(linear).forward is not nn.Linear.forward:
        return f"its class, {type(linear).__name__}, has a product of its own"
    if dict(linear.named_parameters(recurse=False)).get("weight") is None:
        return "its weight is no parameter, but computed from others"
    return ""


def _local(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else local_part(value)
