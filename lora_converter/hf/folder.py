"""Hugging Face directories as files: what weights one holds, and the headers of safetensors files."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from lora_converter.files import check_regular, read_json

INDEX_FILE = "model.safetensors.index.json"

logger = logging.getLogger(__name__)

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes that an update can be added to, as safetensors names them. Others are codes of a quantized weight."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the header of a safetensors file (format: https://huggingface.co/docs/safetensors)."""

    dtype: str
    shape: list[int]
    nbytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS.values()

    def cast(self, dtype: torch.dtype) -> "Entry":
        return Entry(FLOATS[dtype], self.shape, math.prod(self.shape) * dtype.itemsize)


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model's weights: those that its index names, or `model.safetensors`.

    Attributes:
        shards: The files, in the order of the folder.
        weights: Key -> (file, tensor in its header).
        config: Its `config.json`; empty if there is none.
        ignored: Other safetensors files in the folder, which are not part of the model.
    """

    path: Path
    shards: list[Path]
    weights: dict[str, tuple[Path, Entry]]
    config: dict[str, Any]
    ignored: list[str]

    def read(self, key: str) -> torch.Tensor:
        """A weight, whole."""
        with safe_open(self.weights[key][0], framework="pt") as file:
            return file.get_tensor(key)


def open_model(folder: str | Path) -> ModelFolder:
    """What a Hugging Face model folder says that it holds, compared with its files' headers.

    Raises:
        ValueError: There is neither an index nor a `model.safetensors`, a file or a tensor is missing, or something is
            damaged.
    """
    folder = Path(folder)
    placed = _placed_by_index(folder)
    names = sorted(set(placed.values())) if placed is not None else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).exists()]:
        if placed is None:
            raise ValueError(
                f"{folder} holds no model.safetensors and no {INDEX_FILE}. Name the Hugging Face directory of the base."
            )
        raise ValueError(f"{folder} is not complete: {', '.join(missing)} of {INDEX_FILE} is missing.")
    weights: dict[str, tuple[Path, Entry]] = {}
    for name in names:
        for key, entry in read_header(folder / name)[0].items():
            if placed is None or placed.get(key, name) == name:
                weights[key] = (folder / name, entry)
    if placed is not None and (lost := sorted(placed.keys() - weights.keys())):
        raise ValueError(f"{folder} is not complete: {', '.join(lost)} of {INDEX_FILE} is not in the files.")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    ignored = sorted({path.name for path in folder.glob("*.safetensors")} - set(names))
    if ignored:
        logger.warning("%s: not part of the model, and left out: %s.", folder, ", ".join(ignored))
    return ModelFolder(folder, [folder / name for name in names], weights, config, ignored)


def _placed_by_index(folder: Path) -> dict[str, str] | None:
    """Key -> file, as the index has it; None without index."""
    path = folder / INDEX_FILE
    try:
        placed = read_json(path).get("weight_map")
    except FileNotFoundError:
        return None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{path} is damaged: its weight_map is no table from keys to files.")
    if outside := sorted({name for name in placed.values() if Path(name).name != name or name in ("", ".", "..")}):
        raise ValueError(f"{path} names {', '.join(map(repr, outside))}, which is not in its folder.")
    return placed


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors in the order of their bytes, and metadata, of a safetensors file.

    Raises:
        ValueError: It is damaged, or no such file.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:  # which checks the header against the file's size
            names, metadata = file.offset_keys(), file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({e}).") from None
    with open(path, "rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    entries = {}
    for name in names:
        first, end = header[name]["data_offsets"]
        entries[name] = Entry(header[name]["dtype"], header[name]["shape"], end - first)
    return entries, metadata


def write_header(file: BinaryIO, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    """Begins a safetensors file. The bytes of the tensors must follow, in the order of `entries`, without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file of floating-point tensors of one dtype. safetensors' own writer shuffles the metadata.

    Args:
        tensors: Looked up by name one at a time, for the header and again for the bytes, and not kept.
    """
    with open(path, "wb") as file:
        write_header(file, {name: _entry(tensors[name]) for name in sorted(tensors)}, metadata)
        for name in sorted(tensors):
            _write_bytes(file, tensors[name])


def _entry(value: torch.Tensor) -> Entry:
    return Entry(FLOATS[value.dtype], list(value.shape), value.nbytes)


def _write_bytes(file: BinaryIO, value: torch.Tensor) -> None:
    if value.numel():
        file.write(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
