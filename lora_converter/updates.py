"""The update of a base weight, without the whole of it anywhere: this rank's part in fp32, a piece at a time.

    s · L Rᵀ        L (..., rows, rank), R (..., columns, rank), for a weight (..., rows, columns)

A piece is one matrix: a linear's, or one expert's. What is in memory beside the weight is a few pieces and the factors
that belong to this rank's part of it. Factors are gathered along those mesh dims alone over which they are sharded
otherwise than the weight asks.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lora_converter.tensors import full_tensor, is_finite, local_indices

Tensor = torch.Tensor


def low_rank_updates(left: Tensor, right: Tensor, weight: Tensor, *, scaling: float) -> Iterator[Tensor]:
    """This rank's part of s · L Rᵀ, in pieces along the weight's first dim and on its device.

    Args:
        left: L, whole or sharded; then this is a collective, of all ranks that share the weight.
        right: R, as L.
        weight: Whose dims and placements count; of a packed one the last dim is that of a block's bytes.
    """
    dims = weight.ndim - (weight.dtype is torch.uint8)
    rows, columns = dims - 2, dims - 1
    experts = {dim: dim for dim in range(rows)}
    ours = _part_beside(left, weight, {**experts, rows: rows}).to(weight.device)
    others = _part_beside(right, weight, {**experts, columns: rows}).to(weight.device)
    pairs = zip(ours.split(1), others.split(1), strict=True) if experts else [(ours, others)]
    for one, other in pairs:
        yield (one.float() @ other.float().mT).mul_(scaling)


def weight_sides(a: Tensor, b: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """L and R of `low_rank_updates`, of A and B.

    Args:
        transposed: The weight is stored as (in_features, out_features).
    """
    return (a.t(), b) if transposed else (b, a.t())


def add_updates(base: Tensor, updates: Iterable[Tensor], *, out: Tensor | None = None) -> bool:
    """Adds updates to a weight, in fp32 and rounded once to its dtype.

    Args:
        base: This rank's part of the weight.
        updates: Its update, in pieces along the first dim.
        out: Where the sums go to, `base` itself say; nowhere if left out.

    Returns:
        Whether all sums are finite on this rank.
    """
    start, finite = 0, True
    for update in updates:
        rows = base.narrow(0, start, len(update))
        sums = (rows.float() + update).to(base.dtype)
        finite = is_finite(sums) and finite
        if out is not None:
            out.narrow(0, start, len(update)).copy_(sums)
        start += len(update)
    assert start == len(base)
    return finite


def on_all_ranks(holds: bool, weight: Tensor) -> bool:
    """Whether something holds on every rank that shares a weight: they go on together, or none does. A collective."""
    if not isinstance(weight, DTensor):
        return holds
    mesh = weight.device_mesh
    flag = torch.tensor(int(holds), device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
    return bool(flag)


def _part_beside(factor: Tensor, weight: Tensor, shared: dict[int, int]) -> Tensor:
    """What belongs to this rank's part of a weight.

    Args:
        shared: Dim of the weight -> the same dim of the factor. Along its other dims the factor is whole.
    """
    if not isinstance(weight, DTensor):
        return full_tensor(factor)
    moved = [_moved(placement, shared) for placement in weight.placements]
    wanted = [placement for placement in moved if placement is not None]
    if isinstance(factor, DTensor) and factor.device_mesh == weight.device_mesh and len(wanted) == len(moved):
        return factor.redistribute(placements=wanted).to_local()
    part = full_tensor(factor)
    for dim, own in shared.items():
        each = part.shape[own] // weight.shape[dim]  # columns of a packed block
        indices = local_indices(weight, dim).unsqueeze(1) * each + torch.arange(each)
        part = part.index_select(own, indices.flatten().to(part.device))
    return part


def _moved(placement: Placement, shared: dict[int, int]) -> Placement | None:
    """A weight's placement as one of a factor; None if it is of a kind that cannot be moved to another dim."""
    dim = getattr(placement, "dim", None)
    if dim not in shared:
        return Replicate()
    if shared[dim] == dim:
        return placement
    return Shard(shared[dim]) if type(placement) is Shard else None
