"""The low-rank linear as one operation: y = x Wᵀ + b + s · (x Aᵀ) Bᵀ with W and b frozen.

What the mathematics asks for beside the frozen linear is rank-sized work and little traffic; the composition of plain
operations moves much more, because each result of size tokens x features is written, read again and added. Here

    forward     S = s · (x Aᵀ);  y = x Wᵀ + b + S Bᵀ, one product accumulating onto the other
    backward    dS = s · (dy B);  dB = dyᵀ S;  dA = dSᵀ x;  dx = dy W + dS A in the same way, if x needs it
    saved       x, S, A, B and W as they are: no cast, no contiguous copy, nothing of size tokens x out

so that a linear of K inputs and N outputs moves 4 K + 4 N elements per token over the frozen one, where the composition
with the scale on the output moves 6 K + 10 N. Which product accumulates onto which is the device's choice, as is one
addition instead, 6 K + 6 N (`order.py`).

The forward is one operator of the dispatcher, `lora_converter::linear`. Selective activation checkpointing, which
decides about operators, thus sees one large product per linear, as without an adapter (`as_plain_product`); and what it
keeps is never written to afterwards. Under torch.compile, which fuses by itself, and for what the operation does not
cover (trained base weights, DTensors, quantized weights), the composition is used, with the scale on the (tokens,
rank) tensor. The operation has one derivative: no double backward, no torch.func transforms.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_converter.order import sum_of_products

Tensor = torch.Tensor

_library = torch.library.Library("lora_converter", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scaling, Tensor? keep) -> (Tensor, Tensor)"
)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float,
    keep: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + scaling · ((x ∘ keep) Aᵀ) Bᵀ.

    Args:
        x: (..., in_features).
        weight: W, (out_features, in_features).
        bias: (out_features).
        a: A, (rank, in_features), of any floating dtype: cast to that of the computation, x's or autocast's.
        b: B, (out_features, rank).
        keep: Dropout's mask, boolean, of x's shape; what is left of x is not scaled up here, but in `scaling`.

    Returns:
        (..., out_features).
    """
    if _needs_composition(x, weight, bias):
        return F.linear(x, weight, bias) + low_rank_update(x, a, b, scaling=scaling, keep=keep)
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out = _LowRankLinear.apply(rows_of(x), weight, bias, a.to(x.dtype), b.to(x.dtype), scaling, rows_of(keep))
    return shaped_like(out, x)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What a product of x is computed in where autocast is on and x is none of fp64."""
    device = x.device.type
    if x.dtype is torch.float64 or not _has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@torch.compiler.assume_constant_result  # the compiler of torch 2.11 cannot look into it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


@overload
def rows_of(x: Tensor) -> Tensor: ...
@overload
def rows_of(x: Tensor | None) -> Tensor | None: ...
def rows_of(x: Tensor | None) -> Tensor | None:
    """(..., features) -> (tokens, features)."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def shaped_like(out: Tensor, x: Tensor) -> Tensor:
    """A result, (tokens, out_features), in the shape that x asks for.

    Not as a view, as nn.Linear's result is none: FSDP2 and in-place operations downstream treat views specially.
    """
    return out if x.ndim == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


def low_rank_update(x: Tensor, a: Tensor, b: Tensor, *, scaling: float, keep: Tensor | None = None) -> Tensor:
    """scaling · ((x ∘ keep) Aᵀ) Bᵀ alone, of plain operations."""
    return _small_product(_small_product(kept(x, keep), a) * scaling, b)


def _small_product(x: Tensor, factor: Tensor) -> Tensor:
    """x factorᵀ as a batch of one: selective activation checkpointing keeps every second `aten.mm`, and counting the
    rank-sized ones it would keep others than without an adapter.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    return torch.bmm(rows, factor.to(x.dtype).t().unsqueeze(0)).view(*x.shape[:-1], factor.shape[0])


def _needs_composition(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    special = isinstance(x, DTensor) or is_traceable_wrapper_subclass(weight)  # DTensors, quantized weights
    return trains or special or torch.compiler.is_compiling()


class _LowRankLinear(torch.autograd.Function):
    """`lora_converter::linear` and its gradients with respect to x, A and B. x: (tokens, in_features)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, keep):
        out, s = torch.ops.lora_converter.linear(x, weight, bias, a, b, scaling, keep)
        ctx.save_for_backward(x, s, weight, a, b, keep)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, a, b, keep = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _, _ = ctx.needs_input_grad
        dx = da = db = None
        if wants_b:
            db = dy.t() @ s
        if wants_a or wants_x:
            ds = (dy @ b).mul_(ctx.scaling)
        if wants_a:
            da = ds.t() @ kept(x, keep)
        if wants_x:
            dx = sum_of_products(dy, weight, ds, a, keep=keep)
        return dx, None, None, da, db, None, None


def linear_kernel(x, weight, bias, a, b, scaling, keep):
    """The operator's implementation. x: (tokens, in_features) -> y (tokens, out_features), S (tokens, rank)."""
    s = (kept(x, keep) @ a.t()).mul_(scaling)
    return sum_of_products(x, weight.t(), s, b.t(), bias=bias), s


def as_plain_product(func: object, args: tuple) -> tuple:
    """What a policy of selective activation checkpointing is asked about: our operator as the base's own product.

    Args:
        func: An operator, with the positional arguments `args`.

    Returns:
        (operator, *arguments).
    """
    if func is not torch.ops.lora_converter.linear.default:
        return (func, *args)
    x, weight, bias = args[:3]
    if bias is not None:
        return (torch.ops.aten.addmm.default, bias, x, weight.t())
    return (torch.ops.aten.mm.default, x, weight.t())


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """What dropout leaves of x, not scaled."""
    return x if keep is None else x * keep


def _linear_shapes(x, weight, bias, a, b, scaling, keep):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


_library.impl("linear", linear_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("lora_converter::linear", _linear_shapes, lib=_library)
