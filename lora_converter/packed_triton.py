"""Weights unpacked on CUDA in one pass: a block's bytes in and its values out, no tensor between."""

import torch
import triton
import triton.language as tl

_CODE_BYTES = 2048
"""Of a program: with four warps the fastest of what was tried on an H200, by 3 % (docs/packed.md)."""


def unpack_blocks(
    packed: torch.Tensor, values: torch.Tensor, into: torch.Tensor, *, code_bytes: int, high_first: bool
) -> None:
    """Fills `into` with what a CUDA tensor holds.

    Args:
        packed: (blocks, bytes), uint8, contiguous: codes, then a scale, whose dtype its number of bytes tells: an
            exponent of 2, from -128 on, bf16 or fp32.
        values: fp32, on its device: (16), of two codes a byte, or (256), of one.
        into: (blocks, code_bytes · codes a byte), contiguous.
        code_bytes: Of a block.
        high_first: Of two codes, the first is the high half.
    """
    blocks, block_bytes = packed.shape
    at_a_time = _CODE_BYTES // code_bytes
    grid = ((blocks + at_a_time - 1) // at_a_time,)
    with torch.cuda.device_of(packed):
        _kernel[grid](
            packed,
            values,
            into,
            blocks,
            CODE_BYTES=code_bytes,
            SCALE_BYTES=block_bytes - code_bytes,
            TWO_CODES=len(values) == 16,
            HIGH_FIRST=high_first,
            BLOCKS=at_a_time,
            num_warps=4,
        )


@triton.jit
def _kernel(
    packed,
    values,
    into,
    blocks,
    CODE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TWO_CODES: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    start = packed + block * (CODE_BYTES + SCALE_BYTES)
    codes = tl.load(start[:, None] + tl.arange(0, CODE_BYTES)[None, :], mask=there[:, None], other=0).to(tl.int32)
    # A byte at a time, since blocks are aligned to nothing more; the last one is the most significant.
    bits = tl.zeros([BLOCKS], dtype=tl.uint32)
    for i in tl.static_range(SCALE_BYTES):
        byte = tl.load(start + CODE_BYTES + i, mask=there, other=0).to(tl.uint32)
        bits |= byte << (8 * (i + 4 - SCALE_BYTES))
    if SCALE_BYTES == 1:  # 2 to the (byte - 128); fp32's exponents end at -126, what is below it has its digits shifted
        byte = bits >> 24
        bits = tl.where(byte > 1, (byte - 1) << 23, 1 << (21 + byte))
    scale = bits.to(tl.float32, bitcast=True)[:, None]
    if TWO_CODES:
        high, low = tl.load(values + (codes >> 4)) * scale, tl.load(values + (codes & 15)) * scale
        found = tl.interleave(high, low) if HIGH_FIRST else tl.interleave(low, high)
    else:
        found = tl.load(values + codes) * scale
    size: tl.constexpr = CODE_BYTES * 2 if TWO_CODES else CODE_BYTES
    tl.store(into + block[:, None] * size + tl.arange(0, size)[None, :], found, mask=there[:, None])
