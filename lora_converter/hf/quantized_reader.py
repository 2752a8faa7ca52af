"""DCP's view of a quantized Hugging Face folder: each quantized weight twice, as values and as packed bytes."""

import dataclasses
import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lora_converter.hf.quantized_weights import Files, QuantizedWeight

PACKED = ".packed"
"""Added to the stored name of a weight, it is that of its packed form."""

_VALUES = 2**22
"""That are read at a time, so that little is in memory beside what they are read into."""


class QuantizedReader(StorageReader):
    """Another reader of the folder, with quantized weights read here, dequantized and packed.

    Args:
        host: Reads all other weights. What it would say of the quantized ones is not asked.
        weights: By their stored names.
        parts: Stored tensors that are parts of quantized weights, and are not shown.
    """

    def __init__(self, host: StorageReader, weights: Mapping[str, QuantizedWeight], parts: frozenset[str]):
        self._host, self._weights, self._parts = host, weights, parts
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any) -> Metadata:
        """What the folder holds."""
        if self._metadata is None:
            found = self._host.read_metadata(*args)
            entries = {name: entry for name, entry in found.state_dict_metadata.items() if name not in self._parts}
            for name, weight in self._weights.items():
                entries[name] = _entry(weight.shape, weight.dtype)
                if weight.fits:
                    entries[name + PACKED] = _entry(weight.format.packed_shape(weight.shape), torch.uint8)
            self._metadata = dataclasses.replace(found, state_dict_metadata=entries)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads slices of quantized weights, then has the others read."""
        others = []
        with Files() as files:
            for item in plan.items:
                if weight := self._weights.get(item.storage_index.fqn.removesuffix(PACKED)):
                    target = planner.resolve_tensor(item).detach()
                    _read(files, weight, item, target)
                    planner.commit_tensor(item, target)
                else:
                    others.append(item)
        return self._host.read_data(dataclasses.replace(plan, items=others), planner)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP's."""
        self._host.reset(checkpoint_id)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """DCP's."""
        self._host.set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """DCP's."""
        return self._host.prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """DCP's."""
        return self._host.prepare_global_plan(plans)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP's."""
        return HuggingFaceStorageReader.validate_checkpoint_id(checkpoint_id)


def _entry(shape: tuple[int, ...], dtype: torch.dtype) -> TensorStorageMetadata:
    size = torch.Size(shape)
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[whole])


def _read(files: Files, weight: QuantizedWeight, item: ReadItem, target: torch.Tensor) -> None:
    """Reads a slice, a few rows at a time.

    Raises:
        ValueError: It is not in the weight, or the target has another shape.
    """
    is_packed = item.storage_index.fqn != weight.name
    shape = weight.format.packed_shape(weight.shape) if is_packed else weight.shape
    slices = [slice(first, first + size) for first, size in zip(item.storage_offsets, item.lengths, strict=True)]
    inside = len(slices) == len(shape) and all(s.start >= 0 and s.stop <= n for s, n in zip(slices, shape, strict=True))
    if not inside or target.shape != item.lengths:
        raise ValueError(f"{item.storage_index.fqn} of shape {shape} has no slice {slices} of shape {target.shape}.")
    if not target.numel():
        return
    *lead, rows, columns = slices[:-1] if is_packed else slices
    step = max(_VALUES // weight.shape[-1], 1)
    for matrix in itertools.product(*(range(s.start, s.stop) for s in lead)):
        into = target[tuple(index - s.start for index, s in zip(matrix, lead, strict=True))]
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            if is_packed:
                found = weight.packed(files, matrix, some, columns)[..., slices[-1]]
            else:
                found = weight.values(files, matrix, some, columns, dtype=target.dtype)
            into[some.start - rows.start : some.stop - rows.start].copy_(found)
