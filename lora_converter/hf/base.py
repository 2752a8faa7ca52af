"""Reads a Hugging Face base into a model of any layout: of each weight, the part that this rank holds.

Names and orders are the model's own StateDictAdapter's. What it only renames, DCP reads by itself. What it reorders,
splits or takes apart is read in pieces (`pieces.py`): the adapter would do that to shards, and where a shard holds part
of a head, DTensor either refuses the view (FSDP2 over more ranks than there are key-value heads) or, on FSDP2 x TP,
returns other rows without a word (torch 2.13). So is what it combines from several weights. What it changes
in another way is read whole, one weight at a time.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.tensor import DTensor

from lora_converter.dcp.folder import check_fits
from lora_converter.dcp.reader import read
from lora_converter.dcp.twins import Twins
from lora_converter.hf.folder import open_model
from lora_converter.hf.naming import HFPart, StateDictAdapter, hf_parts, hf_parts_together
from lora_converter.hf.pieces import Piece, PieceReader, Whole, blocks_of, packed_blocks_of
from lora_converter.hf.quantized import packed_parts, quantization_everywhere
from lora_converter.packed_formats import FORMATS
from lora_converter.ranks import together

logger = logging.getLogger(__name__)


class HuggingFaceBase:
    """The weights of `base`, as the Hugging Face folder at `path` has them: `check`, then `load`.

    Args:
        adapter: The model's StateDictAdapter.
        base: The model's frozen parameters and buffers, sharded or not, packed or not.
        quantized: The folder's weights are quantized in a way of the host's, and are read dequantized by its reader.
    """

    def __init__(self, adapter: StateDictAdapter, path: str, base: Twins, *, quantized: bool):
        self.adapter, self.path, self._base = adapter, path, base
        self._quantized, self._folder = quantized, quantization_everywhere(path)
        self._wanted = base.wanted()
        self._parts: dict[str, list[HFPart]] = {}
        self._whole: dict[str, str] = {}
        base.stored_packed |= set(self._find_packed())
        inseparable: dict[str, tuple[int, ...]] = {}
        for name, value in self._wanted.items():
            if name in base.stored_packed:
                continue
            if isinstance(value, torch.Tensor) and value.ndim and not self._sort(name, value):
                inseparable[name] = tuple(value.shape)
        self._find_together(inseparable)
        self._renamed = self._others_renamed(self._wanted)

    def _find_packed(self) -> Iterator[str]:
        """Packed weights that the folder has packed so: their parts are known then."""
        stored = self._folder.formats if self._folder else {}
        for name, form in self._base.formats.items() if stored else ():
            parts = packed_parts(self.adapter, name, tuple(self._wanted[name].shape), stored)
            if parts and stored[parts[0].name] == form:
                self._parts[name] = parts
                yield name

    def _find_together(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What the adapter expresses together alone: the weights of a module, or else those of one around it."""
        around = {name: name.rpartition(".")[0] for name in shapes}
        while around:
            groups: dict[tuple[str, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
            for name, module in around.items():
                groups[module, len(shapes[name])][name] = shapes[name]
            for group in groups.values():
                with suppress(ValueError):  # what is left in the end is left to the adapter
                    self._parts |= hf_parts_together(self.adapter, group)
            around = {n: module.rpartition(".")[0] for n, module in around.items() if module and n not in self._parts}

    def _others_renamed(self, entries: dict[str, Any]) -> dict[str, Any]:
        """What the adapter makes of those that are not read in pieces."""
        return self.adapter.to_hf({n: v for n, v in entries.items() if n not in self._parts and n not in self._whole})

    def _sort(self, name: str, value: torch.Tensor) -> bool:
        """Asks the adapter what becomes of a weight, first with one without data. False if it fails."""
        probe = torch.empty(value.shape, dtype=value.dtype, device="meta")
        try:
            converted = self.adapter.to_hf({name: probe})
        except Exception:  # it comes with others alone; what is wrong else, it says when it has all of them
            return False
        if len(converted) == 1 and next(iter(converted.values())) is probe:  # renamed
            return True
        try:
            self._parts[name] = hf_parts(self.adapter, name, tuple(value.shape))
        except ValueError:
            for hf_name, result in converted.items():
                if isinstance(value, DTensor) and len(converted) == 1 and result.shape == value.shape:
                    self._whole[name] = hf_name
        return True

    def check(self) -> None:
        """Compares names and shapes with the folder's.

        Raises:
            ValueError: On all ranks, if some do not fit; all are named.
        """
        parts = [part for parts in self._parts.values() for part in parts]
        wanted = {part.name: torch.empty(part.shape, device="meta") for part in parts}
        wanted |= {hf_name: self._wanted[name] for name, hf_name in self._whole.items()}
        self._reader = together(self._open)
        stored = together(lambda: self._reader.read_metadata())
        check_fits({**self._renamed, **wanted}, stored, f"The base in {self.path}")

    def load(self) -> None:
        """Reads into the model what this rank holds of it."""

        def read_parts() -> None:
            for part in self._base.parts():
                self._read(part)

        together(read_parts)

    def _read(self, part: dict[str, Any]) -> None:
        renamed = self._others_renamed(part)
        read(renamed, self.path, self._reader, PieceReader(self._pieces(part)), no_dist=True)
        given = self.adapter.from_hf(renamed)
        self._check_all_are_given(part, given)
        for name, value in given.items():
            if name in part and value is not part[name]:
                part[name].copy_(value)

    def _check_all_are_given(self, part: dict[str, Any], given: Container[str]) -> None:
        """Refuses to pack what the adapter leaves out: whatever the memory held. What is not packed is told."""
        lost = [n for n in part if not any(n in known for known in (given, self._parts, self._whole))]
        if packed := [name for name in lost if name in self._base.formats]:
            raise ValueError(
                f"{self.path} gives no values to {len(packed)} weights that are to be packed, which "
                f"{type(self.adapter).__name__} does not name: {', '.join(packed)}. Load a DCP folder."
            )
        if matrices := [name for name in lost if isinstance(part[name], torch.Tensor) and part[name].ndim > 1]:
            logger.warning(
                f"LoRA: {self.path} gives no values to {len(matrices)} weights, which {type(self.adapter).__name__} "
                f"does not name, and which stay as they were initialised: {', '.join(matrices)}."
            )

    def _pieces(self, entries: dict[str, Any]) -> Iterator[Piece]:
        for name, value in entries.items():
            for part in self._parts.get(name, ()):
                if name in self._base.stored_packed:
                    yield from packed_blocks_of(part, self._wanted[name], value, FORMATS[self._base.formats[name]])
                else:
                    yield from blocks_of(part, value)
            if hf_name := self._whole.get(name):
                yield Whole(hf_name, (0,) * value.ndim, tuple(value.shape), value, name, self.adapter)

    def _open(self) -> StorageReader:
        """The host's reader, for the files that are the model's alone: it would read whatever lies in the folder."""
        shards = {path.name for path in open_model(self.path).shards}
        reader = self.adapter.get_hf_storage_reader(self.path, self._quantized and not self._folder)
        reader.fs = _Only(reader.fs, shards)
        reader.read_metadata = functools.cache(reader.read_metadata)  # the headers of all files
        return self._folder.reader(reader) if self._folder else reader


class _Only:
    """A file system whose folders hold no other weights than some."""

    def __init__(self, fs: Any, names: set[str]):
        self._fs, self._names = fs, names

    def ls(self, path: str) -> list[str]:
        """The files of a folder, without other safetensors files."""
        return [f for f in self._fs.ls(path) if not f.endswith(".safetensors") or Path(f).name in self._names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)
