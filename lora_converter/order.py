"""The order in which a linear with an adapter takes the two products whose sum it is, x W + s F.

W is the frozen weight. F is a factor, so that s F costs little but the traffic of a result as large as x W's.

    update first    out = s F;  x W accumulates onto it
    base first      out = x W;  s F accumulates onto it
    added           out = x W;  s F beside it, and one addition

The first two move 2 elements per element of the result over the frozen linear, the third 4: it is for devices on which
accumulating costs more than an addition. There it is the safe choice, since PEFT takes the same products and makes more
passes: it scales the update in one of its own, and then adds.

Measured, as the time of a block over the frozen one's (docs/performance.md): bf16 on an H100, update first 1.19, base
first 1.25; bf16 on an AMD EPYC with bf16 instructions, base first 1.10, added 1.13, PEFT 1.14; bf16 on an Intel Xeon
without, base first 1.12, PEFT 1.10. Not measured: other dtypes on GPUs, AMD's GPUs (`cuda` too), CPUs with AMX or of
another kind than x86, and "added" on that Xeon. `scripts/bench.py layer --orders` on such a device would tell.
"""

import functools
from enum import Enum

import torch

Tensor = torch.Tensor


class Order(Enum):
    UPDATE_FIRST = "update first"
    BASE_FIRST = "base first"
    ADDED = "added"


def order_of(device: torch.device, dtype: torch.dtype) -> Order:
    """For forward and backward, with and without bias and dropout."""
    if device.type == "cuda":
        return Order.UPDATE_FIRST
    if device.type == "cpu" and not _accumulates_well(dtype):
        return Order.ADDED
    return Order.BASE_FIRST


@functools.cache
def _accumulates_well(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of the dtype. Of fp16's nothing is known: few CPUs have them."""
    if dtype is torch.bfloat16:
        # Not torch.ops.mkldnn._is_mkldnn_bf16_supported, which is true without them too.
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return dtype is not torch.float16


def sum_of_products(
    x: Tensor, w: Tensor, s: Tensor, f: Tensor, *, bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """x w + s f + bias, or x w + (s f) ∘ keep, in the order of x's device and dtype.

    Args:
        x: (tokens, inputs).
        w: (inputs, outputs).
        s: (tokens, rank).
        f: (rank, outputs).
        bias: (outputs). Not together with `keep`.
        keep: Dropout's mask, boolean, (tokens, outputs). Where it is given, base first ends in an addition too.

    Returns:
        (tokens, outputs), in memory of its own.
    """
    assert bias is None or keep is None
    order = order_of(x.device, x.dtype)
    if order is Order.UPDATE_FIRST:
        return _masked(_product(s, f, bias), keep).addmm_(x, w)
    out = _product(x, w, bias)
    if order is Order.BASE_FIRST and keep is None:
        return out.addmm_(s, f)
    return out.add_(_masked(_product(s, f, None), keep))


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)


def _masked(update: Tensor, keep: Tensor | None) -> Tensor:
    return update if keep is None else update.mul_(keep)
