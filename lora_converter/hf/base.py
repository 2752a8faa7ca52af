"""Reads a Hugging Face base into a model of any layout, through the model's own StateDictAdapter.

The adapter turns sharded weights into Hugging Face's order (`to_hf`), loads into the result and turns it back
(`from_hf`). Renamed weights survive that on any layout. Permuted ones do not: Llama's q and k rows are viewed as
heads, and where a shard holds part of a head, DTensor either refuses the view (FSDP2 over more ranks than there are
key-value heads) or, on FSDP2 x TP, returns other rows without a word (torch 2.13). So a permuted weight is read whole,
a few at a time, and each rank keeps its slice. Remove when DTensor views are right for _StridedShard.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader
from torch.distributed.tensor import DTensor

from lora_converter.dcp.folder import check_fits
from lora_converter.dcp.states import ModelSubset
from lora_converter.hf.folder import open_model
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.ranks import together
from lora_converter.tensors import copy_full_

_BYTES_AT_A_TIME = 2**30


class HuggingFaceBase:
    """The weights of `base`, as the Hugging Face folder at `path` has them: `check`, then `load`.

    Args:
        adapter: The model's StateDictAdapter.
        base: The model's frozen parameters and buffers, sharded or not.
        quantized: The folder's weights are quantized, and are read dequantized.
    """

    def __init__(self, adapter: StateDictAdapter, path: str, base: ModelSubset, *, quantized: bool):
        self.adapter, self.path, self._base = adapter, path, base
        self._quantized = quantized
        self._state_dict = base.state_dict()
        self._permuted = {
            name: hf_name
            for name, value in self._state_dict.items()
            if isinstance(value, DTensor) and (hf_name := _permuted_name(adapter, name, value))
        }
        self._renamed = adapter.to_hf({n: v for n, v in self._state_dict.items() if n not in self._permuted})

    def check(self) -> None:
        """Compares names and shapes with the folder's.

        Raises:
            ValueError: On all ranks, if some do not fit; all are named.
        """
        permuted = {hf: self._state_dict[name] for name, hf in self._permuted.items()}
        self._shards = together(lambda: {path.name for path in open_model(self.path).shards})
        stored = together(lambda: self._reader().read_metadata())
        check_fits({**self._renamed, **permuted}, stored, f"The base in {self.path}")

    def load(self) -> None:
        """Reads everything into the model."""
        dcp.load(self._renamed, storage_reader=self._reader())
        for group in self._groups():
            # Stages of a pipeline have different numbers of groups, so every rank reads by itself.
            dcp.load(group, storage_reader=self._reader(), no_dist=True)
            for name, full in self.adapter.from_hf(group).items():
                copy_full_(self._state_dict[name], full)
        self._base.load_state_dict(self.adapter.from_hf(self._renamed))

    def _reader(self) -> StorageReader:
        """The host's, for the files that are the model's alone: it would read whatever lies in the folder."""
        reader = self.adapter.get_hf_storage_reader(self.path, self._quantized)
        reader.fs = _Only(reader.fs, self._shards)
        return reader

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


class _Only:
    """A file system whose folders hold no other weights than some."""

    def __init__(self, fs: Any, names: set[str]):
        self._fs, self._names = fs, names

    def ls(self, path: str) -> list[str]:
        """The files of a folder, without other safetensors files."""
        return [f for f in self._fs.ls(path) if not f.endswith(".safetensors") or Path(f).name in self._names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)


def _permuted_name(adapter: StateDictAdapter, name: str, value: DTensor) -> str | None:
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
