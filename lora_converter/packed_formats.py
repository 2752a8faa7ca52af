"""The packed formats: NF4, MXFP4 and fp8 in blocks.

NF4 is bitsandbytes', without its double quantisation: of weights in bf16 the absmax is exact in bf16 (QLoRA,
https://arxiv.org/abs/2305.14314). nf4-fp32 is for what bitsandbytes has packed with it. mxfp4 is gpt-oss's, of the OCP
Microscaling specification 1.0. fp8 is DeepSeek-V3's, in blocks of 128 x 128; the scale of one is there once per row, so
that rows can be sharded.
"""

import functools

import torch
import torch.nn.functional as F

from lora_converter.packed import PackedFormat

Tensor = torch.Tensor


class NF4(PackedFormat):
    """The nearest of 16 fixed values, after division by the largest of the block. Between two, the lower one."""

    first_code_is_high = True

    def table(self, device: torch.device) -> Tensor:
        return _nf4_values(device)

    def _encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        absmax = blocks.abs().amax(-1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
        codes = torch.bucketize(scaled, _nf4_bounds(blocks.device), out_int32=True).to(torch.uint8)
        return codes[..., 0::2] << 4 | codes[..., 1::2], absmax.to(self.scale_dtype)

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return _two_per_byte(codes, _nf4_pairs(codes.device)).mul_(scales.float().unsqueeze(-1))


class MXFP4(PackedFormat):
    """Sign, two bits of exponent, one of mantissa, times a power of two. Between two, the one with an even code."""

    def table(self, device: torch.device) -> Tensor:
        return _mxfp4_doubled(device)

    def _encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        largest = blocks.abs().amax(-1)
        exponent = (torch.frexp(largest).exponent - 3).clamp_(min=-127)  # the largest comes to 4 up to 8
        exponent[largest == 0] = -127
        size = torch.ldexp(blocks.abs(), -exponent.unsqueeze(-1))
        codes = torch.bucketize(size, _mxfp4_bounds(blocks.device), out_int32=True).to(torch.uint8)
        codes |= torch.signbit(blocks).to(torch.uint8) << 3
        return codes[..., 1::2] << 4 | codes[..., 0::2], (exponent + 127).to(torch.uint8)

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        # Half the power times twice the value: the largest power, 2**128, is none of fp32.
        powers = torch.pow(2.0, scales.int() - 128)
        return _two_per_byte(codes, _mxfp4_pairs(codes.device)).mul_(powers.unsqueeze(-1))


class FP8Blocks(PackedFormat):
    """float8_e4m3fn, times a scale per 128 x 128 that brings the largest to 448."""

    rows_together = 128

    def table(self, device: torch.device) -> Tensor:
        return _fp8_values(device)

    def _encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        rows, step = blocks.shape[0], self.rows_together
        largest = F.pad(blocks.abs().amax(-1), (0, 0, 0, -rows % step)).unflatten(0, (-1, step)).amax(1)
        factor = torch.where(largest > 0, (448.0 / largest).clamp_(max=3e38), 1.0)
        codes = (blocks * self.per_row(factor, rows).unsqueeze(-1)).clamp_(-448, 448).to(torch.float8_e4m3fn)
        return codes, self.per_row(1.0 / factor, rows)

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).float().mul_(scales.unsqueeze(-1))

    def per_row(self, scales: Tensor, rows: int) -> Tensor:
        """A released grid of scales, (..., out / 128 rounded up, blocks) -> (..., out, blocks).

        Args:
            rows: out.
        """
        return scales.repeat_interleave(self.rows_together, -2)[..., :rows, :]


FORMATS: dict[str, PackedFormat] = {
    packed.name: packed
    for packed in (
        NF4("nf4", 64, 32, torch.bfloat16),
        NF4("nf4-fp32", 64, 32, torch.float32),
        MXFP4("mxfp4", 32, 16, torch.uint8),
        FP8Blocks("fp8", 128, 128, torch.float32),
    )
}
"""Name -> format. Modules and operators keep the name."""


def _two_per_byte(codes: Tensor, pairs: Tensor) -> Tensor:
    """(blocks, bytes) -> (blocks, 2 · bytes), by a table (256, 2)."""
    return F.embedding(codes.int(), pairs).flatten(-2)


_NF4_VALUES = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
_MXFP4_SIZES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _middles(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    return _NF4_VALUES.to(device)


@functools.cache
def _nf4_bounds(device: torch.device) -> Tensor:
    return _middles(_NF4_VALUES).to(device)


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    return torch.stack([_NF4_VALUES.repeat_interleave(16), _NF4_VALUES.repeat(16)], -1).to(device)


@functools.cache
def _mxfp4_bounds(device: torch.device) -> Tensor:
    bounds = _middles(_MXFP4_SIZES)
    # What lies on a bound gets the code below it: where that is odd, the bound is below what lies on it.
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.tensor(0.0))
    return bounds.to(device)


@functools.cache
def _mxfp4_doubled(device: torch.device) -> Tensor:
    """Twice the values, since scales are half of them (see `_decode`)."""
    return torch.cat([_MXFP4_SIZES, -_MXFP4_SIZES]).mul_(2).to(device)


@functools.cache
def _mxfp4_pairs(device: torch.device) -> Tensor:
    values = _mxfp4_doubled(device)
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], -1)


@functools.cache
def _fp8_values(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
