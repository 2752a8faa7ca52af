"""What one rank needs of a Hugging Face base: slices of stored weights, and where they belong in its shards.

    q_proj of 4 heads of 8 rows, on the second of four ranks, which has the host's rows 8 to 15

    stored rows   8 9 10 11 12 13 14 15     consecutive: one piece
    belong at     0 2  4  6  1  3  5  7     of the shard, in the order that `hf_parts` found

The stored indices that a shard needs of a dim make up a few runs of consecutive ones; half a head has two. Each
combination of runs over the dims is a piece. `PieceReader` has them read by whatever reader the host has for its
folders, beside what DCP reads without help.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from lora_converter.hf.naming import HFPart, StateDictAdapter
from lora_converter.hf.quantized_reader import PACKED
from lora_converter.packed import PackedFormat
from lora_converter.tensors import copy_full_, local_part


@dataclass(frozen=True)
class Piece:
    """A slice of a stored weight."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    value: torch.Tensor
    """The host's tensor, or this rank's part of it, that it belongs to."""

    def target(self) -> torch.Tensor:
        """What it can be read into."""
        return torch.empty(self.sizes, dtype=self.value.dtype, device="cpu")

    def put(self, piece: torch.Tensor) -> None:
        """Puts it where it belongs, once it is read into `target`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Block(Piece):
    """A run of stored indices in each dim.

    Attributes:
        order: The stored dims in the order of the host's, then those of size 1 that the host has not.
        places: Of each of the host's dims, the indices in `value` that the run belongs at.
    """

    order: tuple[int, ...]
    places: tuple[slice | torch.Tensor, ...]

    def target(self) -> torch.Tensor:
        """The shard's own memory, where the places are consecutive too."""
        if not self._is_in_order:
            return super().target()
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self.value[self.places].reshape([self.sizes[dim] for dim in self.order]).permute(back)

    def put(self, piece: torch.Tensor) -> None:
        """Reorders it into the shard, unless it is there already."""
        if not self._is_in_order:
            device = self.value.device
            lists = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p.long() for p in self.places]
            places = torch.meshgrid(*(numbers.to(device) for numbers in lists), indexing="ij")
            self.value[places] = piece.permute(self.order).reshape([len(numbers) for numbers in lists]).to(device)

    @property
    def _is_in_order(self) -> bool:
        return all(isinstance(place, slice) for place in self.places)


@dataclass(frozen=True)
class Whole(Piece):
    """A whole weight, which the adapter turns into the host's by itself."""

    key: str
    adapter: StateDictAdapter

    def put(self, piece: torch.Tensor) -> None:
        """Keeps this rank's part of it."""
        copy_full_(self.value, self.adapter.from_hf({self.name: piece})[self.key])


def blocks_of(part: HFPart, value: torch.Tensor) -> Iterator[Block]:
    """What this rank's part of `value`, a tensor of the host, needs of a stored weight."""
    firsts, sizes = _extent(value)
    dims = [_runs(*dim) for dim in zip(part.indices, part.places, firsts, sizes, strict=True)]
    order = [dim for dim in part.dims if dim is not None]
    order += [dim for dim in range(len(part.shape)) if dim not in order]
    for chosen in itertools.product(*dims):
        offsets, lengths = [0] * len(part.shape), [1] * len(part.shape)
        for dim, (first, length, _) in zip(part.dims, chosen, strict=True):
            if dim is not None:
                offsets[dim], lengths[dim] = first, length
        places = tuple(place for *_, place in chosen)
        yield Block(part.name, tuple(offsets), tuple(lengths), local_part(value), tuple(order), places)


def packed_blocks_of(part: HFPart, dense: torch.Tensor, packed: torch.Tensor, form: PackedFormat) -> Iterator[Block]:
    """What this rank's part of `packed` needs of a weight that is stored packed, too, and whose columns are its own.

    Args:
        dense: What it stands for, sharded likewise.
    """
    for block in blocks_of(part, dense):
        (*places, columns), size = block.places, form.block
        assert isinstance(columns, slice)
        yield Block(
            part.name + PACKED,
            (*block.offsets[:-1], block.offsets[-1] // size, 0),
            (*block.sizes[:-1], block.sizes[-1] // size, form.block_bytes),
            local_part(packed),
            (*block.order, len(block.order)),
            (*places, slice(columns.start // size, columns.stop // size), slice(0, form.block_bytes)),
        )


def _runs(
    indices: torch.Tensor | None, own: torch.Tensor | None, first: int, size: int
) -> list[tuple[int, int, slice | torch.Tensor]]:
    """The stored indices that a shard of `size` from `first` on needs of one dim: runs of (first, length, places).

    Args:
        indices: What stands at each of the stored indices that are the host's.
        own: Those stored indices, where others stand beside them.
    """
    if own is not None:
        indices = torch.arange(len(own)) if indices is None else indices
    elif indices is None:
        return [(first, size, slice(0, size))] if size else []
    elif len(indices) == 1:
        place = int(indices[0]) - first
        return [(0, 1, slice(place, place + 1))] if 0 <= place < size else []
    wanted = ((indices >= first) & (indices < first + size)).nonzero().flatten()
    stored = wanted if own is None else own[wanted]
    breaks = [0, *((stored.diff() != 1).nonzero().flatten() + 1).tolist(), len(wanted)]
    runs = []
    for begin, end in itertools.pairwise(breaks if len(wanted) else []):
        places = indices[wanted[begin:end]] - first
        in_order = bool((places.diff() == 1).all())
        runs.append(
            (int(stored[begin]), end - begin, slice(int(places[0]), int(places[-1]) + 1) if in_order else places)
        )
    return runs


def _extent(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a tensor begins, and its shape. A shard is one block, whatever shards it."""
    if not isinstance(value, DTensor):
        return (0,) * value.ndim, tuple(value.shape)
    (chunk,) = value.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


class PieceReader(DefaultLoadPlanner):
    """DCP's planner, which has pieces read beside a state dict's tensors."""

    def __init__(self, pieces: Iterable[Piece]):
        super().__init__()
        self._pieces = {str(number): piece for number, piece in enumerate(pieces)}

    def create_local_plan(self) -> LoadPlan:
        """DCP's, and the pieces."""
        plan = super().create_local_plan()
        pieces = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(number),
                dest_offsets=torch.Size([0] * len(piece.sizes)),
                storage_index=MetadataIndex(piece.name, [0] * len(piece.sizes)),
                storage_offsets=torch.Size(piece.offsets),
                lengths=torch.Size(piece.sizes),
            )
            for number, piece in self._pieces.items()
        ]
        return dataclasses.replace(plan, items=[*plan.items, *pieces])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """What a slice is read into."""
        piece = self._pieces.get(read_item.dest_index.fqn)
        return piece.target() if piece else super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Puts what was read where it belongs."""
        if piece := self._pieces.get(read_item.dest_index.fqn):
            piece.put(tensor)
