"""Gradients of the factors that tensor parallelism keeps whole: one sum for all of them, once per step.

Beside a column-wise base A is whole and each rank back-propagates through its own columns of B; beside a row-wise base
B is whole and each rank sees its own part of x Aᵀ. Either way a rank's gradient is one term of a sum over the
tensor-parallel ranks. Nothing between the backward and the optimizer needs the sum, and everything there is linear
(accumulation over micro-batches, FSDP2's reduction, pipeline stages), so it is taken at the end: all such gradients in
one flat buffer, one all-reduce per mesh and dtype. Under FSDP2 the buffer holds this rank's shards only.

Until then a gradient's placement says Replicate, because FSDP2 would otherwise sum each one by itself, and again at
every micro-batch. A linear that is whole on every rank (deepseek_v3's wq_a and wkv_a) leaves the placement of its
factors' gradients to DTensor; those that come out Partial join the sum, unless FSDP2 has summed them before.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from lora_converter.apply import adapted_linears

_MARK = "_gradient_is_partial_over"


def mark_partial_gradients(model: nn.Module) -> None:
    """Marks the parameters whose gradients are partial sums. Call when FSDP2 has made the parameters that train."""
    for linear in adapted_linears(model):
        for factor in (linear.lora_a, linear.lora_b):
            if factor.whole_over is not None:
                setattr(factor.weight, _MARK, factor.whole_over)


@torch.no_grad()
def sum_partial_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Completes the gradients of marked parameters, in place. Call once per step, before clipping.

    Returns:
        The number of all-reduces: one per mesh and dtype, none without tensor parallelism.
    """
    buffers: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for param in parameters:
        grad, mesh = param.grad, getattr(param, _MARK, None)
        if grad is None:
            continue
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if isinstance(grad, DTensor) and grad.placements == (Partial(),):
            mesh = grad.device_mesh
            param.grad = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
        if mesh is not None:
            buffers[mesh, local.dtype, local.device].append(local)
    for (mesh, _, _), grads in buffers.items():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=mesh.get_group())
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
    return len(buffers)
