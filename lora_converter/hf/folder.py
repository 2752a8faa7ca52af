"""Hugging Face directories as files: what weights one holds, and the headers of safetensors files."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from lora_converter.files import check_regular

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


def weight_shapes(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Key -> (file, shape, dtype as safetensors names it) of every tensor in the folder, read from its files' headers.

    Raises:
        ValueError: There is no such file, or one is damaged.
    """
    shapes: dict[str, tuple[Path, list[int], str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {key: (path, entry.shape, entry.dtype) for key, entry in read_header(path)[0].items()}
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file. Name the Hugging Face directory of the base.")
    return shapes


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


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file of floating-point tensors of one dtype. safetensors' own writer shuffles the metadata."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    entries = {name: Entry(FLOATS[value.dtype], list(value.shape), value.nbytes) for name, value in ordered.items()}
    with open(path, "wb") as file:
        write_header(file, entries, metadata)
        for value in ordered.values():
            file.write(value.view(torch.uint8).numpy().data if value.numel() else b"")
