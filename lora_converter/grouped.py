"""The low-rank linear of many experts at once, over rows that are sorted by expert: `torch._grouped_mm`.

    y_e = x_e W_eᵀ + s · (x_e A_e) B_eᵀ    W (experts, out, in) frozen, A (experts, in, rank), B (experts, out, rank)

As `ops.py` does for one linear, it saves x, the (tokens, rank) product S = s · x A, A, B and W, and never computes the
gradient of W:

    forward     S = s · (x A);  y = x Wᵀ + S Bᵀ
    backward    dB = dyᵀ S;  dS = s · (dy B);  dA = xᵀ dS;  dx = dy W + dS Aᵀ, if x needs it

Every grouped product wants strides that are multiples of 16 bytes, so the rank of A and B is padded with zeros. Rows
after the last expert's belong to nobody: products leave them unwritten, and nothing here reduces over them.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lora_converter.packed_ops import packed_grouped_mm

Tensor = torch.Tensor

_ALIGNMENT = 16
"""Bytes."""


def grouped_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *, scaling: float, form: str = ""
) -> Tensor:
    """x_e W_eᵀ + scaling · (x_e A_e) B_eᵀ for each expert e.

    Args:
        x: (rows, in_features), expert 0's rows first.
        weight: W, (experts, out_features, in_features), frozen, of x's dtype; or packed.
        a: A, (experts, in_features, rank), of any floating dtype: cast to x's.
        b: B, (experts, out_features, rank).
        offsets: Where each expert's rows end, int32, (experts).
        form: The name of the weight's packed format, if it has one.

    Returns:
        (rows, out_features).
    """
    assert not weight.requires_grad
    out: Tensor = _GroupedLinear.apply(
        x, weight, _aligned(a.to(x.dtype)), _aligned(b.to(x.dtype)), offsets, scaling, form
    )
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, offsets, scaling, form):
        s = torch._grouped_mm(x, a, offs=offsets).mul_(scaling)
        out = grouped_product(x, weight, offsets, form=form)
        out.add_(torch._grouped_mm(s, b.transpose(-2, -1), offs=offsets))
        ctx.save_for_backward(x, s, weight, a, b, offsets)
        ctx.scaling, ctx.form = scaling, form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, a, b, offsets = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, _, _, _ = ctx.needs_input_grad
        dx = da = db = None
        dy = dy.contiguous()
        if wants_b:
            db = torch._grouped_mm(dy.t(), s, offs=offsets)
        if wants_a or wants_x:
            ds = torch._grouped_mm(dy, b, offs=offsets).mul_(ctx.scaling)
        if wants_a:
            da = torch._grouped_mm(x.t(), ds, offs=offsets)
        if wants_x:
            dx = grouped_product(dy, weight, offsets, form=ctx.form, backward=True)
            dx.add_(torch._grouped_mm(ds, a.transpose(-2, -1), offs=offsets))
        return dx, None, da, db, None, None, None


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, *, form: str = "", backward: bool = False) -> Tensor:
    """x_e W_eᵀ for each expert e; with `backward` x_e W_e. The rest is as for `grouped_linear`."""
    if form:
        return packed_grouped_mm(x, weight, offsets, form=form, backward=backward)
    return torch._grouped_mm(x, weight if backward else weight.transpose(-2, -1), offs=offsets)


def _aligned(factor: Tensor) -> Tensor:
    """A factor whose rank is padded to whole multiples of 16 bytes; itself where it is one."""
    padding = -factor.shape[-1] % (_ALIGNMENT // factor.element_size())
    return F.pad(factor, (0, padding)) if padding else factor
