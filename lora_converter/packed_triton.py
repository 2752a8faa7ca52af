"""NF4 unpacked on CUDA in one pass: 34 bytes in and 64 values out per block, no tensor between."""

import torch
import triton
import triton.language as tl


def unpack_nf4(packed: torch.Tensor, values: torch.Tensor, into: torch.Tensor, *, code_bytes: int) -> None:
    """Fills `into` with what a CUDA tensor holds.

    Args:
        packed: (blocks, bytes), uint8, contiguous: two codes a byte, the first in the high half, then the absmax, in
            bf16 or fp32 by what is left of the bytes.
        values: (16), fp32, on its device.
        into: (blocks, 2 · code_bytes), contiguous.
    """
    blocks, block_bytes = packed.shape
    scale_bytes = block_bytes - code_bytes
    with torch.cuda.device_of(packed):
        _kernel[(triton.cdiv(blocks, 32),)](packed, values, into, blocks, code_bytes, scale_bytes, BLOCKS=32)


@triton.jit
def _kernel(packed, values, into, blocks, CODE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    start = packed + block * (CODE_BYTES + SCALE_BYTES)
    codes = tl.load(start[:, None] + tl.arange(0, CODE_BYTES)[None, :], mask=there[:, None], other=0).to(tl.int32)
    # A byte at a time, since blocks of 34 bytes are aligned to nothing more; the last one is the most significant.
    bits = tl.zeros([BLOCKS], dtype=tl.uint32)
    for i in tl.static_range(SCALE_BYTES):
        byte = tl.load(start + CODE_BYTES + i, mask=there, other=0).to(tl.uint32)
        bits |= byte << (8 * (i + 4 - SCALE_BYTES))
    absmax = bits.to(tl.float32, bitcast=True)[:, None]
    pairs = tl.interleave(tl.load(values + (codes >> 4)) * absmax, tl.load(values + (codes & 15)) * absmax)
    column = tl.arange(0, 2 * CODE_BYTES)[None, :]
    tl.store(into + block[:, None] * (2 * CODE_BYTES) + column, pairs, mask=there[:, None])
