"""Packed weights: a frozen weight of 4 or 8 bits as one plain uint8 tensor, whose first dims are the weight's.

    weight (..., out, in)  ->  packed (..., out, in / block, bytes):  per block its codes, then its scale

    nf4        64 weights    32 bytes, two codes each, the first in the high half | absmax, bf16    34 bytes
    nf4-fp32   64 weights    the same                                             | absmax, fp32    36 bytes
    mxfp4      32 weights    16 bytes, two codes each, the first in the low half  | exponent + 127  17 bytes
    fp8       128 weights    128 bytes, float8_e4m3fn                             | scale, fp32    132 bytes

A slice along experts, rows or blocks is the packed slice of the weight: FSDP2, tensor, pipeline and expert parallelism
shard it, and checkpoints store it, as any parameter. There is no tensor subclass.

Every weight is rounded to bf16 before it is packed, and unpacked in fp32, rounded once. Here is what formats share;
`packed_formats.py` has the formats, and `packed_ops.py` what computes with packed weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import torch

Tensor = torch.Tensor

_CHUNK = 2**22
"""Weights that are packed or unpacked at a time: what is in memory beside the result, 4 to 16 bytes each."""


@dataclass(frozen=True)
class PackedFormat:
    """How the weights of a block become bytes. A format derives from it."""

    name: str
    block: int
    """Weights per block, along `in`."""
    code_bytes: int
    """Bytes of a block's codes."""
    scale_dtype: torch.dtype

    rows_together = 1
    """Rows of a weight, from its first one on, that share a scale: `pack` wants whole groups, but for the last."""

    first_code_is_high = False
    """Of two codes a byte."""

    @property
    def block_bytes(self) -> int:
        return self.code_bytes + self.scale_dtype.itemsize

    def fits(self, in_features: int) -> bool:
        """Whether a weight of so many columns can be packed."""
        return in_features > 0 and in_features % self.block == 0

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., out, in) -> (..., out, blocks, bytes).

        Raises:
            ValueError: The blocks do not fill `in`.
        """
        if len(shape) < 2 or not self.fits(shape[-1]):
            raise ValueError(
                f"A weight of shape {tuple(shape)} is not made of {self.name} blocks of {self.block} columns."
            )
        return (*shape[:-1], shape[-1] // self.block, self.block_bytes)

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., out, blocks, bytes) -> (..., out, in).

        Raises:
            ValueError: It is the shape of no packed weight.
        """
        if len(shape) < 3 or shape[-1] != self.block_bytes:
            raise ValueError(
                f"A tensor of shape {tuple(shape)} is no packed {self.name}, whose last dim is {self.block_bytes}."
            )
        return (*shape[:-2], shape[-2] * self.block)

    def pack(self, weight: Tensor) -> Tensor:
        """weight: (..., out, in), of any floating dtype -> uint8, (..., out, blocks, bytes), contiguous.

        Raises:
            ValueError: The blocks do not fill `in`, or there is nan or inf in it.
        """
        packed = torch.empty(self.packed_shape(weight.shape), dtype=torch.uint8, device=weight.device)
        if weight.is_meta:
            return packed
        for matrix, into in zip(_matrices(weight, 2), _matrices(packed, 3), strict=True):
            for rows in _chunks(matrix, self.rows_together):
                blocks = matrix[rows].bfloat16().float().unflatten(-1, (-1, self.block))
                if not blocks.isfinite().all():
                    raise ValueError(f"A weight that holds nan or inf cannot be packed as {self.name}.")
                into[rows] = self.join(*self._encode(blocks))
        return packed

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """packed: (..., out, blocks, bytes) -> (..., out, in), contiguous."""
        weight = torch.empty(self.weight_shape(packed.shape), dtype=dtype, device=packed.device)
        if packed.is_meta:
            return weight
        blocks, into = packed.flatten(0, -2), weight.view(-1, self.block)
        if packed.is_cuda and (unpack_blocks := _kernel()):
            table = self.table(packed.device)
            unpack_blocks(
                blocks.contiguous(), table, into, code_bytes=self.code_bytes, high_first=self.first_code_is_high
            )
            return weight
        for start in range(0, len(blocks), step := _CHUNK // self.block):
            codes, scales = self.split(blocks[start : start + step])
            into[start : start + step] = self._decode(codes, scales)
        return weight

    def join(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Packed, of codes and scales as they were released.

        Args:
            codes: (..., blocks, code_bytes), of a dtype of one byte.
            scales: (..., blocks), of `scale_dtype`.
        """
        assert scales.dtype is self.scale_dtype and codes.shape[-1] == self.code_bytes
        return torch.cat([codes.view(torch.uint8), scales.unsqueeze(-1).contiguous().view(torch.uint8)], -1)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales that `join` took."""
        scales = packed[..., self.code_bytes :].contiguous().view(self.scale_dtype).squeeze(-1)
        return packed[..., : self.code_bytes], scales

    def table(self, device: torch.device) -> Tensor:
        """What each code stands for, fp32: (16), or (256) where a byte is one code."""
        raise NotImplementedError

    def _encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """blocks: (out, blocks, block), fp32 -> codes and scales."""
        raise NotImplementedError

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes: (blocks, code_bytes); scales: (blocks) -> (blocks, block), fp32."""
        raise NotImplementedError


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """Unpacks blocks on CUDA; None without Triton."""
    if find_spec("triton") is None:
        return None
    from lora_converter.packed_triton import unpack_blocks

    return unpack_blocks


def _matrices(value: Tensor, dims: int) -> Tensor:
    return value.reshape(prod(value.shape[:-dims]), *value.shape[-dims:])


def _chunks(matrix: Tensor, rows_together: int) -> list[slice]:
    """Rows of a weight, in pieces of about `_CHUNK` weights and of whole groups."""
    step = max(_CHUNK // (matrix.shape[1] * rows_together), 1) * rows_together
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
