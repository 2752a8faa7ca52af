"""Weights of Hugging Face folders that are quantized already, and slices of them in this package's packed formats.

    bitsandbytes NF4   X            codes of the flattened weight, two per byte, the first in the high half
                       X.absmax     one per block of the flattened weight, fp32; or codes of them (double quantization)
                       X.nested_absmax, X.nested_quant_map, nested_offset    what those codes stand for
                       X.quant_state.bitsandbytes__nf4    JSON: the weight's shape, the block, nested_offset
    MXFP4              X_blocks     (..., out, blocks, 16)            X_scales            (..., out, blocks)
    fp8 blocks         X.weight     (..., out, in), float8_e4m3fn     X.weight_scale_inv  one per 128 x 128

What is asked for is all that is read, and sizes are compared with the files' headers before anything is allocated.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import torch.nn.functional as F

from lora_converter.hf.folder import Entry
from lora_converter.packed import PackedFormat
from lora_converter.packed_formats import FORMATS, FP8Blocks

Tensor = torch.Tensor

_ABSMAXES = 2**20
"""That are looked at at a time."""


class Stored(NamedTuple):
    """A tensor of the folder."""

    name: str
    file: Path
    entry: Entry


class Files(ExitStack):
    """Reads slices of stored tensors, of files that are opened once and closed at the end of the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, Any] = {}

    def read(self, stored: Stored, *slices: slice) -> Tensor:
        """A slice, which is read when its values are used.

        Raises:
            ValueError: The file is damaged, or not the one whose header was read.
        """
        try:
            if stored.file not in self._opened:
                self._opened[stored.file] = self.enter_context(safetensors.safe_open(stored.file, framework="pt"))
            found = self._opened[stored.file].get_slice(stored.name)
        except (safetensors.SafetensorError, OSError) as e:
            raise ValueError(f"{stored.file} is damaged or no safetensors file ({e}).") from None
        if (found.get_dtype(), found.get_shape()) != (stored.entry.dtype, stored.entry.shape):
            raise ValueError(f"{stored.file} is not the file that it was: {stored.name} has another dtype or shape.")
        return found[slices or (slice(None),)]


@dataclass(frozen=True)
class QuantizedWeight:
    """A stored weight. Plain data, which can be sent to other ranks.

    Attributes:
        name: The stored name of its codes.
        shape: Of the weight, (..., out, in).
        form: The packed format that holds its bits.
        codes: What its name is stored as.
        scales: One per block, or what they are computed from.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    codes: Stored
    scales: Stored

    dtype = torch.float32
    """One that holds every value."""

    @property
    def format(self) -> PackedFormat:
        return FORMATS[self.form]

    @property
    def fits(self) -> bool:
        """Whether it has a packed form."""
        return self.format.fits(self.shape[-1])

    def packed(self, files: Files, matrix: tuple[int, ...], rows: slice, blocks: slice) -> Tensor:
        """uint8, (rows, blocks, bytes).

        Args:
            matrix: Indices of the dims before `out`.
            blocks: Of a row. The last may end early, and is filled up with zeros.
        """
        raise NotImplementedError

    def values(
        self, files: Files, matrix: tuple[int, ...], rows: slice, columns: slice, *, dtype: torch.dtype
    ) -> Tensor:
        """(rows, columns), computed in fp32 and rounded once."""
        block = self.format.block
        blocks = slice(columns.start // block, -(-columns.stop // block))
        unpacked = self.format.unpack(self.packed(files, matrix, rows, blocks), dtype)
        return unpacked[:, columns.start - blocks.start * block : columns.stop - blocks.start * block]


@dataclass(frozen=True)
class Nested:
    """What the 8-bit codes of absmaxes stand for: `quant_map[code] * absmax + offset`, of blocks of their own."""

    absmax: Stored
    quant_map: Stored
    block: int
    offset: float


@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """Its blocks go over the ends of rows where `in` is no multiple of 64: it has no packed form then."""

    block: int
    nested: Nested | None

    def packed(self, files: Files, matrix: tuple[int, ...], rows: slice, blocks: slice) -> Tensor:
        first = self._first_row(matrix)
        in_row = torch.arange(blocks.start, blocks.stop)
        numbers = torch.arange(first + rows.start, first + rows.stop).unsqueeze(1) * (self.shape[-1] // 64) + in_row
        return self._blocks(files, numbers, self.format)

    def values(
        self, files: Files, matrix: tuple[int, ...], rows: slice, columns: slice, *, dtype: torch.dtype
    ) -> Tensor:
        if self.fits:
            return super().values(files, matrix, rows, columns, dtype=dtype)
        width, first = self.shape[-1], self._first_row(matrix)
        start, stop = (first + rows.start) * width, (first + rows.stop) * width
        numbers = torch.arange(start // 64, -(-stop // 64)).unsqueeze(0)
        unpacked = FORMATS["nf4-fp32"].unpack(self._blocks(files, numbers, FORMATS["nf4-fp32"]), dtype).flatten()
        return unpacked[start % 64 :][: stop - start].view(-1, width)[:, columns]

    def absmaxes(self, files: Files, numbers: Tensor) -> Tensor:
        """In fp32, the very bits that bitsandbytes computes.

        Args:
            numbers: Of bitsandbytes' own blocks.
        """
        found = self._at(files, self.scales, numbers)
        if self.nested is None:
            return found
        scaled = files.read(self.nested.quant_map)[found.long()]
        return scaled * self._at(files, self.nested.absmax, numbers // self.nested.block) + self.nested.offset

    def all_absmaxes(self, files: Files) -> Iterator[Tensor]:
        """In pieces."""
        (count,) = self.scales.entry.shape
        for start in range(0, count, _ABSMAXES):
            yield self.absmaxes(files, torch.arange(start, min(start + _ABSMAXES, count)))

    def _first_row(self, matrix: tuple[int, ...]) -> int:
        """Of a matrix, of the rows of all of them."""
        first = 0
        for index, size in zip(matrix, self.shape[:-2], strict=True):
            first = first * size + index
        return first * self.shape[-2]

    def _blocks(self, files: Files, numbers: Tensor, form: PackedFormat) -> Tensor:
        """Packed blocks.

        Args:
            numbers: (rows, blocks), counting blocks of 64 of the flattened weight.
        """
        first, stop = int(numbers[0, 0]), int(numbers[-1, -1]) + 1
        itemsize = self.codes.entry.nbytes // self.codes.entry.shape[0]  # bytes can be stored as a larger dtype's
        codes = files.read(self.codes, slice(first * 32 // itemsize, stop * 32 // itemsize)).flatten().view(torch.uint8)
        absmaxes = self.absmaxes(files, numbers * 64 // self.block)
        return form.join(_in_blocks(codes, 32)[numbers - first], absmaxes.to(form.scale_dtype))

    @staticmethod
    def _at(files: Files, stored: Stored, numbers: Tensor) -> Tensor:
        """Values of a flat tensor, of which the part from the first to the last is read."""
        first, last = int(numbers.min()), int(numbers.max())
        return files.read(stored, slice(first, last + 1))[numbers - first]


@dataclass(frozen=True)
class MXFP4Weight(QuantizedWeight):
    dtype = torch.bfloat16

    def packed(self, files: Files, matrix: tuple[int, ...], rows: slice, blocks: slice) -> Tensor:
        lead = [slice(index, index + 1) for index in matrix]
        codes = files.read(self.codes, *lead, rows, blocks, slice(None)).flatten(0, -3)
        return self.format.join(codes, files.read(self.scales, *lead, rows, blocks).flatten(0, -2))


@dataclass(frozen=True)
class FP8Weight(QuantizedWeight):
    def packed(self, files: Files, matrix: tuple[int, ...], rows: slice, blocks: slice) -> Tensor:
        lead, form = [slice(index, index + 1) for index in matrix], self.format
        assert isinstance(form, FP8Blocks)
        columns = slice(blocks.start * 128, min(blocks.stop * 128, self.shape[-1]))
        codes = files.read(self.codes, *lead, rows, columns).flatten(0, -2).view(torch.uint8)
        groups = slice(rows.start // 128, -(-rows.stop // 128))
        scales = files.read(self.scales, *lead, groups, blocks).flatten(0, -2).float()
        first = rows.start % 128
        return form.join(_in_blocks(codes, 128), form.per_row(scales, first + rows.stop - rows.start)[first:])


def _in_blocks(codes: Tensor, size: int) -> Tensor:
    """(..., bytes) -> (..., blocks, size), with zeros at the end of a last one that ends early."""
    missing = -codes.shape[-1] % size
    return (F.pad(codes, (0, missing)) if missing else codes).unflatten(-1, (-1, size))
