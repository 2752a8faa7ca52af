"""Reads a Hugging Face base into a model of any layout, through the model's own StateDictAdapter.

torchtitan turns sharded weights into Hugging Face's order (`to_hf`), loads into the result and turns it back
(`from_hf`). Renamed weights survive that on any layout. Permuted ones do not: Llama's q and k rows are viewed as
heads, and where a shard holds part of a head, DTensor either refuses the view (FSDP2 over more ranks than there are
key-value heads) or, on FSDP2 x TP, returns other rows without a word (torch 2.13). So a permuted weight is read whole,
a few at a time, and each rank keeps its slice. Remove when DTensor views are right for _StridedShard.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torchtitan.protocols import BaseStateDictAdapter

from lora_converter.linear import copy_full_

_BYTES_AT_A_TIME = 2**30

StateDict = dict[str, Any]


class HuggingFaceBase:
    """The weights of `state_dict`, as the Hugging Face folder at `path` has them.

    Args:
        adapter: The model's StateDictAdapter.
        state_dict: Name -> parameter or buffer of the model, sharded or not; loaded in place.
        quantized: The folder's weights are quantized (`checkpoint.initial_load_in_hf_quantized`).
    """

    def __init__(self, adapter: BaseStateDictAdapter, path: str, state_dict: StateDict, *, quantized: bool):
        self.adapter = adapter
        self._reader: Callable[[], StorageReader] = lambda: adapter.get_hf_storage_reader(path, quantized)
        self._permuted = {
            name: hf_name
            for name, value in state_dict.items()
            if isinstance(value, DTensor) and (hf_name := _permuted_name(adapter, name, value))
        }
        self._state_dict = state_dict
        self._renamed = adapter.to_hf({n: v for n, v in state_dict.items() if n not in self._permuted})

    def metadata(self) -> Metadata:
        """What the folder holds."""
        return self._reader().read_metadata()

    def wanted(self) -> StateDict:
        """Hugging Face name -> tensor of the shape that the model needs."""
        return {**self._renamed, **{hf: self._state_dict[name] for name, hf in self._permuted.items()}}

    def load(self) -> StateDict:
        """Reads everything. Permuted weights are in place then; the others are returned for `load_state_dict`."""
        dcp.load(self._renamed, storage_reader=self._reader())
        for group in self._groups():
            # Stages of a pipeline have different numbers of groups, so every rank reads by itself.
            dcp.load(group, storage_reader=self._reader(), no_dist=True)
            for name, full in self.adapter.from_hf(group).items():
                copy_full_(self._state_dict[name], full)
        return self.adapter.from_hf(self._renamed)

    def _groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """Whole CPU tensors for the permuted weights, by Hugging Face name, a bounded number of bytes at a time."""
        group: dict[str, torch.Tensor] = {}
        size = 0
        for name, hf_name in self._permuted.items():
            group[hf_name] = torch.empty(self._state_dict[name].shape, dtype=self._state_dict[name].dtype)
            size += group[hf_name].nbytes
            if size >= _BYTES_AT_A_TIME:
                yield group
                group, size = {}, 0
        if group:
            yield group


def _permuted_name(adapter: BaseStateDictAdapter, name: str, value: DTensor) -> str | None:
    """The Hugging Face name of a weight that `to_hf` keeps whole but does not pass through unchanged.

    Asked of the adapter with a tensor without data. A weight that is split, or that the adapter converts only
    together with others, is an expert's; the adapter has rules of its own for those.
    """
    probe = torch.empty(value.shape, dtype=value.dtype, device="meta")
    try:
        converted = adapter.to_hf({name: probe})
    except KeyError:
        return None
    if len(converted) != 1:
        return None
    hf_name, result = next(iter(converted.items()))
    return hf_name if result is not probe and result.shape == probe.shape else None
