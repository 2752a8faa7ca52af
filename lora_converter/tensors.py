"""Tensors that may be sharded: the whole, this rank's part, and one in the layout of the other."""

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; a collective then."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the layout of `param`: this rank's slice of it, without communication."""
    if isinstance(param, DTensor):
        return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    return full


@torch.no_grad()
def copy_full_(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copies the full tensor into `param`: all of it, or this rank's slice of a DTensor, without communication."""
    param.copy_(shard_like(full, param))


@torch.no_grad()
def copy_(param: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a tensor of the same full shape into `param`.

    One that is whole, or sharded as `param` is, without communication; one that is sharded otherwise is gathered.
    """
    if _layout(value) == _layout(param):
        local_part(param).copy_(local_part(value))
    else:
        copy_full_(param, full_tensor(value))


def _layout(value: torch.Tensor) -> object:
    return (value.device_mesh, value.placements) if isinstance(value, DTensor) else None


def local_part(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def with_local(own: torch.Tensor, like: DTensor, shape: tuple[int, ...]) -> DTensor:
    """A tensor of which this rank holds `own`, sharded as another.

    Args:
        shape: Of the whole tensor, of as many dims as `like`'s placements need.
    """
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), own.dtype)
    # Not by from_local, which does not take the shards of FSDP2 over those of tensor parallelism.
    return DTensor(own, DTensorSpec(like.device_mesh, like.placements, meta), requires_grad=False)


def is_finite(value: torch.Tensor) -> bool:
    """Whether an unsharded tensor holds neither nan nor inf. Takes no mask of its size."""
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in value.aminmax())


def local_indices(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Which indices of a dim of the whole tensor this rank holds, in its order, on the CPU. No communication."""
    indices = torch.arange(value.shape[dim])
    if not isinstance(value, DTensor):
        return indices
    # In a tensor of as many dims, so that the placements can stay what they are.
    shape = [len(indices) if d == dim else 1 for d in range(value.ndim)]
    placements = [p if getattr(p, "dim", None) == dim else Replicate() for p in value.placements]
    whole = indices.view(shape).to(value.device_mesh.device_type)
    return distribute_tensor(whole, value.device_mesh, placements, src_data_rank=None).to_local().flatten().cpu()


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters of FSDP2 in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
