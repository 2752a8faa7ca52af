"""Linears with a packed weight as operators: W is unpacked into the dtype of x, multiplied with, and gone.

    forward     W = unpack(packed);  y = x Wᵀ + b + S Bᵀ with S = s · (x Aᵀ), as `ops.py` has it
    backward    W = unpack(packed) again;  dx = dy W + dS A;  dA and dB as there
    saved       the packed weight;  with an adapter also x, S, A and B

An adapter or none, the forward is one operator of the dispatcher, and so is the product of the backward. To
torch.compile they are closed: it sees no dense weight, which it would otherwise keep from the forward for the backward.
To selective activation checkpointing each is a product (`as_product`). They have one derivative.
"""

import torch

from lora_converter.ops import as_plain_product, autocast_dtype, kept, linear_kernel, rows_of, shaped_like
from lora_converter.order import sum_of_products
from lora_converter.packed_formats import FORMATS

Tensor = torch.Tensor

_library = torch.library.Library("lora_converter", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor packed, str form, Tensor? bias, Tensor? a, Tensor? b, float scaling, Tensor? keep)"
    " -> (Tensor, Tensor)"
)
_library.define("packed_linear_dx(Tensor dy, Tensor packed, str form, Tensor? ds, Tensor? a, Tensor? keep) -> Tensor")
_library.define("packed_grouped_mm(Tensor x, Tensor packed, str form, Tensor offsets, bool backward) -> Tensor")


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    form: str,
    factors: tuple[Tensor, Tensor] | None = None,
    scaling: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b, and with `factors` A and B + scaling · ((x ∘ keep) Aᵀ) Bᵀ.

    Args:
        x: (..., in_features). No DTensor.
        packed: W, (out_features, blocks, bytes), uint8.
        bias: (out_features).
        form: The name of the packed format.
        factors: A, (rank, in_features), and B, (out_features, rank), of any floating dtype: cast to that of the
            computation, x's or autocast's.
        keep: Dropout's mask, boolean, of x's shape; what is left of x is not scaled up here, but in `scaling`.

    Returns:
        (..., out_features).

    Raises:
        ValueError: x holds integers, or the packed weight no bytes any more.
    """
    if not x.is_floating_point() or packed.dtype is not torch.uint8:
        raise ValueError(
            f"A product of {x.dtype} inputs with a packed weight in {packed.dtype}: inputs are floating point, and a "
            "packed weight is uint8 and never cast."
        )
    x = x.to(autocast_dtype(x) or x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    a, b = (None, None) if factors is None else (factor.to(x.dtype) for factor in factors)
    out, _ = torch.ops.lora_converter.packed_linear(rows_of(x), packed, form, bias, a, b, scaling, rows_of(keep))
    return shaped_like(out, x)


def packed_grouped_mm(x: Tensor, packed: Tensor, offsets: Tensor, *, form: str, backward: bool = False) -> Tensor:
    """x_e W_eᵀ for each expert e, or x_e W_e, which the gradient of the other takes. Unpacks all experts at once.

    Args:
        x: (rows, in_features), expert 0's rows first; with `backward` (rows, out_features).
        packed: W, (experts, out_features, blocks, bytes), uint8.
        offsets: Where each expert's rows end, int32, (experts).
        form: The name of the packed format.
    """
    out: Tensor = torch.ops.lora_converter.packed_grouped_mm(x, packed, form, offsets, backward)
    return out


def as_product(func: object, args: tuple) -> tuple:
    """`as_plain_product`, for our operators with packed weights as well."""
    if func is not torch.ops.lora_converter.packed_linear.default:
        return as_plain_product(func, args)
    x, packed, form, bias = args[:4]
    weight = x.new_empty(FORMATS[form].weight_shape(packed.shape), device="meta")
    dense = (x, weight, bias, None, None, 1.0, None)
    return as_plain_product(torch.ops.lora_converter.linear.default, dense)


def packed_linear_kernel(x, packed, form, bias, a, b, scaling, keep):
    """The operator's implementation. x: (tokens, in_features) -> y (tokens, out_features), S (tokens, rank)."""
    weight = FORMATS[form].unpack(packed, x.dtype)
    if a is None:
        return torch.nn.functional.linear(x, weight, bias), x.new_empty(x.shape[0], 0)
    return linear_kernel(x, weight, bias, a, b, scaling, keep)


def packed_linear_dx_kernel(dy, packed, form, ds, a, keep):
    """dy: (tokens, out_features), ds: (tokens, rank) -> dx (tokens, in_features)."""
    weight = FORMATS[form].unpack(packed, dy.dtype)
    return dy @ weight if ds is None else sum_of_products(dy, weight, ds, a, keep=keep)


def packed_grouped_mm_kernel(x, packed, form, offsets, backward):
    if not x.shape[0]:  # torch's product refuses strides that a gradient without rows may have
        return x.new_empty(0, _features(packed, form)[backward])
    weight = FORMATS[form].unpack(packed, x.dtype)
    # On CUDA the rows of a result may be padded, which is not said of ours.
    return torch._grouped_mm(x, weight if backward else weight.transpose(-2, -1), offs=offsets).contiguous()


def _save_linear(ctx, inputs, output):
    x, packed, ctx.form, _, a, b, ctx.scaling, keep = inputs
    ctx.set_materialize_grads(False)
    others = (None,) * 5 if a is None else (x, output[1], a, b, keep)
    ctx.save_for_backward(packed, *others)


def _linear_backward(ctx, dy, _):
    wants_x, _, _, wants_bias, wants_a, wants_b, _, _ = ctx.needs_input_grad
    packed, x, s, a, b, keep = ctx.saved_tensors
    dx = ds = da = db = None
    dbias = dy.sum(0) if wants_bias else None
    if wants_b:
        db = dy.t() @ s
    if a is not None and (wants_a or wants_x):
        ds = (dy @ b).mul_(ctx.scaling)
    if ds is not None and wants_a:
        da = ds.t() @ kept(x, keep)
    if wants_x:
        dx = torch.ops.lora_converter.packed_linear_dx(dy, packed, ctx.form, ds, a, keep)
    return dx, None, None, dbias, da, db, None, None


def _save_grouped(ctx, inputs, output):
    _, packed, ctx.form, offsets, ctx.was_backward = inputs
    ctx.save_for_backward(packed, offsets)


def _grouped_backward(ctx, dy):
    packed, offsets = ctx.saved_tensors
    dx = packed_grouped_mm(dy.contiguous(), packed, offsets, form=ctx.form, backward=not ctx.was_backward)
    return dx, None, None, None, None


def _features(packed: Tensor, form: str) -> tuple[int, ...]:
    return FORMATS[form].weight_shape(packed.shape)[-2:]


def _linear_shapes(x, packed, form, bias, a, b, scaling, keep):
    rank = 0 if a is None else a.shape[0]
    return x.new_empty(x.shape[0], packed.shape[0]), x.new_empty(x.shape[0], rank)


_library.impl("packed_linear", packed_linear_kernel, "CompositeExplicitAutograd")
_library.impl("packed_linear_dx", packed_linear_dx_kernel, "CompositeExplicitAutograd")
_library.impl("packed_grouped_mm", packed_grouped_mm_kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_converter::packed_linear_dx", lib=_library)
def _(dy, packed, form, ds, a, keep):
    return dy.new_empty(dy.shape[0], _features(packed, form)[1])


@torch.library.register_fake("lora_converter::packed_grouped_mm", lib=_library)
def _(x, packed, form, offsets, backward):
    return x.new_empty(x.shape[0], _features(packed, form)[backward])


torch.library.register_fake("lora_converter::packed_linear", _linear_shapes, lib=_library)
torch.library.register_autograd(
    "lora_converter::packed_linear", _linear_backward, setup_context=_save_linear, lib=_library
)
torch.library.register_autograd(
    "lora_converter::packed_grouped_mm", _grouped_backward, setup_context=_save_grouped, lib=_library
)
