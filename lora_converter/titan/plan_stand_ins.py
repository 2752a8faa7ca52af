"""What stands in for what fake CPU tensors cannot run, or run unlike CUDA, while a plan is made. Bytes are what counts.

attention           CUDA's fused kernel, by its shapes: kept for backward are q, k, v, the output and a number per row
                    and head, in 16 bits; in fp32 the host has torch's plain attention, as here
RMS norm            CUDA's fused kernel: keeps its input and a number per row; on CPUs it is five operators
a compiled loss     keeps the logits as they are and a number per token; its backward makes one gradient of them
values              nothing has any: a number that is asked for is 1, and every token has a label
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models import attention
from torchtitan.models.attention import FlexAttentionWrapper, VarlenAttentionWrapper
from torchtitan.models.llama3.infra import parallelize

from lora_converter import order


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention by shapes. q, k, v: (rows, heads, tokens, width).

    Returns:
        (rows, heads, tokens, width of v) and a number per row, head and token.
    """
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    return out, lse.squeeze(-1)


_attention = F.scaled_dot_product_attention


def _fused_where_it_is(q: torch.Tensor, *args: Any, is_causal: bool = False, **options: Any) -> torch.Tensor:
    """As CUDA chooses: plain attention in fp32. DTensors, of context parallelism, have fused kernels alone."""
    if is_causal and (q.dtype in (torch.float16, torch.bfloat16) or isinstance(q, DTensor)):
        return fused_attention(q, *args, **options)[0]
    if not is_causal:
        return _attention(q, *args, **options)
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(q, *args, None, 0.0, True, None, **options)[0]


def _flex_attention(
    self: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False, **options: Any
) -> Any:
    out, lse = fused_attention(q, k, v, scale=options.get("scale"))
    return (out, lse) if return_lse else out


def _small_mask(*args: Any, **kwargs: Any) -> BlockMask:
    """In place of that of a batch, which CUDA's compiled code makes in no memory to speak of."""
    return create_block_mask(lambda row, head, query, key: query >= key, None, None, 128, 128, device="cpu")


def _varlen_attention(
    self: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: Any, scale: float | None = None
) -> torch.Tensor:
    out = fused_attention(q, k, v, scale=scale)[0].transpose(1, 2)
    return out.flatten(0, 1)


class FusedRmsNorm(torch.autograd.Function):
    """CUDA's kernel by shapes. x: (..., width); weight: (width)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        rows = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None) -> Any:
    if not isinstance(x, DTensor):
        return FusedRmsNorm.apply(x, weight)
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return DTensor.from_local(FusedRmsNorm.apply(x.to_local(), local), x.device_mesh, x.placements)


class CompiledLoss(torch.autograd.Function):
    """torchtitan's cross-entropy as Inductor fuses it, by shapes. pred: (rows, tokens, vocabulary)."""

    @staticmethod
    def forward(ctx: Any, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pred, labels, pred.new_empty(labels.shape, dtype=torch.float32))
        return pred.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class Answers(TorchDispatchMode):
    """What code asks of values that are not there. Below all other modes but the FakeTensorMode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default and args[0].ndim == 1:
            return args[0].new_empty((args[0].shape[0], 1), dtype=torch.int64)
        if func is torch.ops.aten.unique_consecutive.default:
            return args[0], args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **(kwargs or {}))


class EvenRouting:
    """Tokens per expert and per rank as a router gives them that sends each the same number."""

    def __init__(self) -> None:
        self._routed = 0
        self._histc = torch.histc

    def histc(self, chosen: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`torch.histc` of the experts that were chosen."""
        self._routed = chosen.numel()
        return self._histc(chosen, *args, **kwargs)

    def tolist(self, counts: torch.Tensor) -> Any:
        """`FakeTensor.tolist`: counts that add up to what this rank has routed."""
        number = counts.numel()
        return [self._routed // number + (index < self._routed % number) for index in range(number)]


def _gather_from_here(values: list[Any], value: Any, group: Any = None) -> None:
    values[:] = [value] * len(values)


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (dist, "all_gather_object", _gather_from_here),  # the other ranks are not there
    (parallelize, "replicate", lambda *args, **kwargs: None),  # DDP's buckets are made by C++, of real memory
    (nn.init, "_no_grad_trunc_normal_", lambda tensor, *args, **kwargs: tensor),  # loops until values are in range
)

_REPLACED_AS_ON_CUDA: tuple[tuple[Any, str, Any], ...] = (
    (F, "scaled_dot_product_attention", _fused_where_it_is),
    (F, "rms_norm", _rms_norm),
    (FlexAttentionWrapper, "forward", _flex_attention),
    (VarlenAttentionWrapper, "forward", _varlen_attention),
    (attention, "_compiled_create_block_mask", _small_mask),
    (order, "order_of", lambda device, dtype: order.Order.UPDATE_FIRST),
)


@contextmanager
def stand_ins(*, as_on_cuda: bool) -> Iterator[None]:
    """Within, they stand in.

    Args:
        as_on_cuda: Also for what CPUs run otherwise than CUDA.
    """
    routing = EvenRouting()
    routed = ((torch, "histc", routing.histc), (FakeTensor, "tolist", lambda counts: routing.tolist(counts)))
    with ExitStack() as stack:
        for owner, name, value in (*_REPLACED, *routed, *(_REPLACED_AS_ON_CUDA if as_on_cuda else ())):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
