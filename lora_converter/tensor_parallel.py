"""Adapters under tensor parallelism: where factors lie on a mesh, and whose gradients are partial sums.

A factor follows its base linear. Its rank dim stays whole, so that x Aᵀ needs no collective of its own:

    base column-wise   x Replicate   W Shard(0)  A Replicate  B Shard(0)   -> Shard(-1)
    base row-wise      x Shard(-1)   W Shard(1)  A Shard(1)   B Replicate  -> Partial

The update is added to this rank's part of the base's product, and what the base's own collective then does to the
sum is right for both. The gradient of x is what the base's own is, Partial and Shard(-1).

The gradient of a whole factor is a partial sum: beside a column-wise base each rank back-propagates through its own
columns of B, beside a row-wise base each sees its own part of x Aᵀ. Nothing between the backward and the optimizer
needs the sum, and everything there is linear (accumulation over micro-batches, FSDP2's reduction, pipeline stages), so
it is taken once per step: all such gradients in one flat buffer, one all-reduce per group and dtype. Under FSDP2 the
buffer holds this rank's shards only.

Until then a gradient's placement says Replicate, because FSDP2 would otherwise sum each one by itself, and again at
every micro-batch. A linear that is whole on every rank (deepseek_v3's wq_a and wkv_a) leaves the placement of its
factors' gradients to DTensor; those that come out Partial join the sum, unless FSDP2 has summed them before.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lora_converter.adapted import adapted_modules
from lora_converter.tensors import local_part

_MARK = "_gradient_is_partial_over"


class LoRAFactor(nn.Linear):
    """One factor of the update: A maps in_features to rank, B maps rank to out_features.

    Tensor parallelism reaches a factor through the plan entry of its base linear: `ColwiseParallel` offers it rows,
    `RowwiseParallel` columns. The factor takes the shard only along the features that it shares with the base.
    """

    rank_dim: int
    """Tensor dim of `weight` that is the rank: 0 for A, 1 for B."""

    whole_over: DeviceMesh | None = None
    """The tensor-parallel mesh over which the factor was kept whole."""

    def __init__(self, in_features: int, out_features: int, *, rank_dim: int, like: torch.Tensor):
        super().__init__(in_features, out_features, bias=False, device=like.device, dtype=like.dtype)
        self.rank_dim = rank_dim

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, but a tensor-parallel shard of the rank dim becomes Replicate."""
        if isinstance(param, DTensor) and param.placements == (Shard(self.rank_dim),):
            self.whole_over = param.device_mesh
            whole = distribute_tensor(self.weight.detach(), param.device_mesh, [Replicate()])
            param = nn.Parameter(whole, requires_grad=self.weight.requires_grad)
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Nothing: values come from `AdaptedModule.reset_adapter`, and the global generator is left alone."""


def local_input(x: torch.Tensor, mesh: DeviceMesh, *, column_wise: bool) -> torch.Tensor:
    """This rank's part of the input that a linear sharded over `mesh` takes."""
    assert isinstance(x, DTensor)
    takes: Placement = Replicate() if column_wise else Shard(x.ndim - 1)
    if x.placements != (takes,):  # a redistribution that changes nothing would still all-reduce a Partial gradient
        x = x.redistribute(mesh, [takes])
    return x.to_local(grad_placements=[Partial() if column_wise else takes])


def local_output(out: torch.Tensor, mesh: DeviceMesh, *, column_wise: bool, out_features: int) -> DTensor:
    """This rank's part of the output, as the DTensor that the linear's plan expects of it.

    Args:
        out_features: Of the whole linear, which the local one does not tell where shards are uneven.
    """
    gives: Placement = Shard(out.ndim - 1) if column_wise else Partial()
    return _placed(out, mesh, [gives], shape=(*out.shape[:-1], out_features))


def rows_on_mesh(x: torch.Tensor) -> DTensor:
    """The input of a linear that is whole on every rank of a mesh, in a placement in which rows are whole."""
    assert isinstance(x, DTensor)
    cut = {x.ndim - 1, None}
    wanted = [Replicate() if not p.is_replicate() and getattr(p, "dim", None) in cut else p for p in x.placements]
    return x if tuple(wanted) == x.placements else x.redistribute(placements=wanted)


def output_on_mesh(out: torch.Tensor, x: DTensor) -> DTensor:
    """This rank's output of a linear that is whole on every rank, placed as its input, `rows_on_mesh`, is."""
    return _placed(out, x.device_mesh, list(x.placements), shape=(*x.shape[:-1], out.shape[-1]))


def _placed(local: torch.Tensor, mesh: DeviceMesh, placements: list[Placement], *, shape: tuple[int, ...]) -> DTensor:
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def local_bias(bias: torch.Tensor | None, mesh: DeviceMesh, *, column_wise: bool) -> torch.Tensor | None:
    """This rank's part of the bias; beside a row-wise weight it is added once, by the first rank."""
    if bias is None or (not column_wise and mesh.get_local_rank() > 0):
        return None
    return local_part(bias)


def shard_of_features(value: torch.Tensor, mesh: DeviceMesh, size: int) -> torch.Tensor:
    """This rank's `size` columns of a tensor that spans all features of a row-wise linear's input."""
    start = mesh.get_local_rank() * math.ceil(value.shape[-1] / mesh.size())
    return value[..., start : start + size].contiguous()


def place_beside(factor: nn.Parameter, weight: DTensor, *, shared_dim: int) -> nn.Parameter:
    """A factor of stacked experts, (experts, features, rank), sharded as its weight asks: by expert, or by features.

    Args:
        shared_dim: The weight's dim that is the factor's features: 2 for A, 1 for B. Along the other it stays whole.
    """
    if isinstance(factor, DTensor):
        return factor
    dims = {0: Shard(0), shared_dim: Shard(1)}
    placements = [dims.get(getattr(p, "dim", -1), Replicate()) for p in weight.placements]
    placed = distribute_tensor(factor.detach(), weight.device_mesh, placements)
    return nn.Parameter(placed, requires_grad=factor.requires_grad)


def whole_beside(factor: nn.Parameter, weight: nn.Parameter) -> DeviceMesh | None:
    """The mesh over which a factor that `place_beside` has placed is whole while its weight is sharded, if any."""
    if not (isinstance(factor, DTensor) and isinstance(weight, DTensor)):
        return None
    mesh = factor.device_mesh
    for dim, (mine, its) in enumerate(zip(factor.placements, weight.placements, strict=True)):
        if mine.is_replicate() and not its.is_replicate():
            assert mesh.mesh_dim_names is not None
            return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[dim]]
    return None


def mark_partial_gradients(model: nn.Module) -> None:
    """Marks the parameters whose gradients are partial sums. Call when FSDP2 has made the parameters that train."""
    for module in adapted_modules(model):
        for name, mesh in module.whole_over().items():
            setattr(module.get_parameter(name), _MARK, mesh)


@torch.no_grad()
def sum_partial_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Completes the gradients of marked parameters, in place. Call once per step, before clipping.

    Returns:
        The number of all-reduces: one per group of ranks and dtype, none without tensor parallelism.
    """
    buffers: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for param in parameters:
        grad, mesh = param.grad, getattr(param, _MARK, None)
        if grad is None:
            continue
        local = local_part(grad)
        if isinstance(grad, DTensor) and grad.placements == (Partial(),):
            mesh = grad.device_mesh
            param.grad = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
        if mesh is not None:
            # Experts have a mesh of their own, of the same ranks.
            ranks = tuple(dist.get_process_group_ranks(mesh.get_group()))
            groups.setdefault(ranks, mesh.get_group())
            buffers[ranks, local.dtype, local.device].append(local)
    for (ranks, _, _), grads in buffers.items():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=groups[ranks])
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
    return len(buffers)
