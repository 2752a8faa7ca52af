"""A frozen float8 linear: one product in the backward, nothing kept of its input, its weight cast once.

torchao's `Float8Linear` is made for weights that train. In eager mode it computes the weight's gradient although nobody
asks for it, keeps the input for that, and casts the weight in every forward and backward. Under torch.compile the
compiler drops what is not used, so there torchao's own forward is taken. Remove when torchao looks at `requires_grad`.

The cast weight is kept beside the weight, a byte per element (two with rowwise scales, which differ for the backward),
and only where FSDP2 does not shard: there a weight is gathered for each use, and a copy that stays would undo that.
"""

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchao.float8.config import ScalingGranularity, ScalingType
from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import GemmInputRole

from lora_converter.swap import swap_class


class FrozenFloat8Linear(nn.Linear):
    """What a `Float8Linear`'s class gains when its weight is frozen. Never constructed: the class is swapped."""

    config: Any
    linear_mm_config: Any
    keeps_cast_weight = False
    """Set when the model has been sharded, see `precision.py`."""

    _cast: tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        x = input
        if self.weight.requires_grad or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cast = self._cast_weight() if self.keeps_cast_weight else None
        out = _FrozenProduct.apply(x, self.weight.t(), cast, self.linear_mm_config, self.config)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def _cast_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wᵀ in float8 for the forward and for the gradient of the input; one tensor where both are cast alike.

        A weight that was written to is cast again, but what is written through `.data` is not seen.
        """
        local = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        version = (local.data_ptr(), local._version)
        if self._cast is None or self._cast[0] != version:
            weight_t, config = self.weight.t(), self.config
            forward = backward = _to_float8(weight_t, "weight", config, self.linear_mm_config)
            of_backward = config.cast_config_weight_for_grad_input
            axiswise = of_backward.scaling_granularity is ScalingGranularity.AXISWISE
            if of_backward != config.cast_config_weight or axiswise:
                backward = _to_float8(weight_t, "weight_for_grad_input", config, self.linear_mm_config)
            self._cast = version, (forward, backward)
        return self._cast[1]


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ as torchao computes it, and the gradient of x alone."""

    @staticmethod
    def forward(ctx, x, weight_t, cast, mm_config, config):
        ctx.cast, ctx.mm_config, ctx.config = cast, mm_config, config
        ctx.save_for_backward(weight_t)
        return matmul_with_hp_or_float8_args.forward(_Nothing(), x, cast[0] if cast else weight_t, mm_config, config)

    @staticmethod
    def backward(ctx, dy):
        (weight_t,) = ctx.saved_tensors
        weight_t = ctx.cast[1] if ctx.cast else _to_float8(weight_t, "weight_for_grad_input", ctx.config, ctx.mm_config)
        rows = _to_float8(dy.reshape(-1, dy.shape[-1]), "grad_output", ctx.config, ctx.mm_config)
        dx = torch.mm(rows, weight_t.t())
        return dx.reshape(*dy.shape[:-1], dx.shape[-1]), None, None, None, None


class _Nothing:
    """Stands for the context of a Function whose forward is borrowed: what it would keep is dropped."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


_CASTS = {
    # operand: (GEMM role, dim of the scales under axiswise scaling), as torchao has them
    "weight": (GemmInputRole.WEIGHT, 0),
    "weight_for_grad_input": (GemmInputRole.WEIGHT, -1),
    "grad_output": (GemmInputRole.GRAD_OUTPUT, -1),
}


def _to_float8(tensor: torch.Tensor, operand: str, config: Any, mm_config: Any) -> torch.Tensor:
    cast = getattr(config, f"cast_config_{operand}")
    if tensor_already_casted_to_fp8(tensor) or cast.scaling_type is ScalingType.DISABLED:
        return tensor
    role, dim = _CASTS[operand]
    return hp_tensor_to_float8_dynamic(
        tensor,
        cast.target_dtype,
        mm_config,
        gemm_input_role=role,
        scaling_granularity=cast.scaling_granularity,
        axiswise_dim=get_maybe_axiswise_dim(dim, cast.scaling_granularity),
        round_scales_to_power_of_2=config.round_scales_to_power_of_2,
    )


def freeze_float8_linears(model: nn.Module) -> None:
    """Swaps the class of every `Float8Linear` of `model`, in place. Before adapters are put on them."""
    for module in model.modules():
        if isinstance(module, Float8Linear):
            swap_class(module, FrozenFloat8Linear)
