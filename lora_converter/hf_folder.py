"""Hugging Face directories as files: what weights one holds, and writing one so that it appears whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes that an update can be added to, as safetensors names them. Others are codes of a quantized weight."""


def weight_shapes(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Key -> (file, shape, dtype as safetensors names it) of every tensor in the folder, read from its files' headers.

    Raises:
        ValueError: There is no such file, or one is damaged.
    """
    shapes: dict[str, tuple[Path, list[int], str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    entry = file.get_slice(key)
                    shapes[key] = (path, entry.get_shape(), entry.get_dtype())
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged or no safetensors file ({e}).") from None
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file. Name the Hugging Face directory of the base.")
    return shapes


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


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors in the order of their bytes, and metadata, of a safetensors file that was opened before."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Entry(value["dtype"], value["shape"], value["data_offsets"][1] - value["data_offsets"][0])
        for name, value in ordered
    }, metadata


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


@contextmanager
def appears_complete(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder`, which takes its place at the end; an error leaves `folder` as it was."""
    draft, old = (folder.with_name(folder.name + ending) for ending in (".incomplete", ".replaced"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _exchange(draft, folder, old)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(draft: Path, folder: Path, old: Path) -> None:
    """`draft` becomes `folder`, and what was there `old`."""
    shutil.rmtree(old, ignore_errors=True)
    replaces = folder.is_symlink() or folder.exists()
    if replaces:
        os.rename(folder, old)
    try:
        os.rename(draft, folder)
    except BaseException:
        if replaces:
            os.rename(old, folder)
        raise
