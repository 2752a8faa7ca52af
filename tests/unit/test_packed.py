"""Packed formats, bit for bit: against bitsandbytes for NF4, transformers, torch and torchao for the others."""

import json
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torchao.prototype.mx_formats.mx_tensor import to_mx
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_converter import packed as packing
from lora_converter.packed import PackedFormat
from lora_converter.packed_formats import FORMATS, FP8Blocks

settings.register_profile("here", derandomize=True, database=None, deadline=None, max_examples=200)
settings.load_profile("here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NF4, NF4_FP32, MXFP4, FP8 = (FORMATS[name] for name in ("nf4", "nf4-fp32", "mxfp4", "fp8"))
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)

SMALLEST_NORMAL = 2.0**-126
SCALES = [0.0, 1e-41, 1e-38, 1e-4, 1.0, 1e4, 1e38]
"""Of a weight's values. In bf16 the first but one are subnormal, and some of the last become the largest there is."""


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """In bf16, finite, with a row and a block of zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values[..., 1, :] = values[..., 2, :64] = 0
    largest = torch.finfo(torch.bfloat16).max
    return values.clamp_(-largest, largest).bfloat16()


@st.composite
def any_values(draw: st.DrawFn) -> torch.Tensor:
    """A block of 64 of any finite bits of bf16; most of one size, so that codes other than zero's are met."""
    bits = torch.frombuffer(bytearray(draw(st.binary(min_size=128, max_size=128))), dtype=torch.bfloat16)
    exponent = draw(st.integers(-133, 127))
    near = torch.ldexp(bits.view(torch.int16) / 2.0**15, torch.tensor(exponent)).bfloat16()
    return torch.where(bits.isfinite(), bits, 0.0) if draw(st.booleans()) else torch.where(near.isfinite(), near, 0.0)


def check_nf4(weight: torch.Tensor) -> None:
    theirs, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    for form in (NF4, NF4_FP32):
        packed = form.pack(weight)
        codes, absmax = form.split(packed)
        assert torch.equal(codes.flatten(), theirs.flatten()) and torch.equal(absmax.float().flatten(), state.absmax)
        for dtype in DTYPES:
            state.dtype = dtype
            expected = bitsandbytes.dequantize_4bit(theirs, state)
            found = form.unpack(packed, dtype)
            assert found.dtype is dtype and found.shape == weight.shape
            # Their kernel for CPUs with AVX-512 writes zeros for what is subnormal in bf16; others of theirs do not.
            counted = form.unpack(packed, torch.float32).abs() >= SMALLEST_NORMAL
            assert torch.equal(found[counted], expected[counted])


@pytest.mark.parametrize("scale", SCALES)
def test_nf4_is_bitsandbytes_own(scale: float) -> None:
    check_nf4(normal(5, 256, scale=scale))


@given(any_values())
def test_nf4_is_bitsandbytes_own_for_any_block(block: torch.Tensor) -> None:
    check_nf4(block.view(1, 64))


def test_nf4_is_bitsandbytes_own_for_any_two_numbers_of_bf16() -> None:
    """A value over a largest one, of all mantissas of both and down to a 256th."""
    mantissas = torch.arange(128, 256) / 128
    values = torch.cat([sign * mantissas * 2.0**-exponent for sign in (1, -1) for exponent in range(9)])
    rows = values.expand(128, -1).clone()
    rows[rows.abs() > mantissas.unsqueeze(1)] = 0
    blocks = rows.unflatten(1, (-1, 48))  # the largest one, 48 others, and zeros
    check_nf4(
        torch.nn.functional.pad(torch.cat([mantissas.view(-1, 1, 1).expand(-1, 48, 1), blocks], 2), (0, 15)).flatten(1)
    )


@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_has_quantized_is_held_bit_for_bit(nested: bool) -> None:
    weight = normal(5, 256)
    theirs, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    expected = bitsandbytes.dequantize_4bit(theirs, state)
    absmax = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    packed = NF4_FP32.join(theirs.view(5, 4, 32), absmax.view(5, 4))
    assert packed.shape == (5, 4, 36) and torch.equal(NF4_FP32.unpack(packed, torch.bfloat16), expected)
    assert torch.equal(absmax.bfloat16().float(), absmax) is not nested  # why there are 36 bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_is_what_transformers_makes_of_gpt_oss_for_any_bytes(dtype: torch.dtype) -> None:
    blocks, scales = (
        torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for shape in [(2, 256, 3, 16), (2, 256, 3)]
    )
    packed = MXFP4.join(blocks, scales)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    torch.testing.assert_close(MXFP4.unpack(packed, dtype), expected, rtol=0, atol=0, equal_nan=True)
    assert packed.shape == (2, 256, 3, 17)


def check_mxfp4(weight: torch.Tensor) -> None:
    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32)
    ours = MXFP4.split(MXFP4.pack(weight))
    assert torch.equal(ours[1], scales.view(torch.uint8).view(ours[1].shape))
    # torchao divides by 2**-126 what it has scaled by 2**-127, the smallest there is.
    counted = ours[1] > 0
    assert torch.equal(ours[0][counted], codes.view(torch.uint8).view(ours[0].shape)[counted])


@pytest.mark.parametrize("scale", SCALES)
def test_mxfp4_is_packed_as_torchao_packs_it(scale: float) -> None:
    check_mxfp4(normal(3, 6, 64, scale=scale))


@given(any_values())
def test_mxfp4_is_packed_as_torchao_packs_it_for_any_block(block: torch.Tensor) -> None:
    check_mxfp4(block.view(1, 64))


def test_between_two_values_mxfp4_takes_the_even_one() -> None:
    weight = torch.cat([torch.linspace(-8, 7.75, 64), torch.linspace(-4, 3.875, 64)]).view(4, 32).bfloat16()
    check_mxfp4(weight)


def fp8_quantizer() -> SimpleNamespace:
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128)))


@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1.0, 1e38])
def test_fp8_blocks_are_transformers_own(scale: float, shape: tuple[int, ...]) -> None:
    weight = normal(*shape, scale=scale)
    found = Fp8Quantize(fp8_quantizer()).convert({"w.weight": weight})
    theirs, grid = found["w.weight"], found["w.weight_scale_inv"]
    packed = FP8.pack(weight)
    assert isinstance(FP8, FP8Blocks) and packed.shape == (*shape[:-1], shape[-1] // 128, 132)
    rows = FP8.per_row(grid, shape[-2])
    assert torch.equal(packed, FP8.join(theirs.unflatten(-1, (-1, 128)), rows))
    for dtype in DTYPES:
        expected = Fp8Dequantize(fp8_quantizer())._dequantize_one(theirs, grid, output_dtype=dtype)
        assert torch.equal(FP8.unpack(packed, dtype), expected)


def test_fp8_blocks_of_tiny_values_stay_finite() -> None:
    """Where transformers' factor, 448 over the largest, is inf."""
    weight = normal(128, 128, scale=1e-38)
    found = FP8.unpack(FP8.pack(weight), torch.float32)
    assert (found - weight).abs().max() <= weight.abs().max() / 16


@pytest.mark.parametrize("rows", [128, 200, 40])
def test_fp8_blocks_that_end_early_are_what_torch_reads(rows: int, tmp_path: Path) -> None:
    """DeepSeek-V3 has matrices of 576 rows."""
    weight = normal(rows, 256)
    packed = FP8.pack(weight)
    codes, scales = FP8.split(packed)
    tensors = {
        "w.weight": codes.reshape(rows, 256).view(torch.float8_e4m3fn),
        "w.weight_scale_inv": scales[::128].contiguous(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = {"w.weight": torch.empty(rows, 256)}
    reader = QuantizedHuggingFaceStorageReader(str(tmp_path), target_dtype=torch.float32, block_size=128)
    dcp.load(expected, storage_reader=reader, no_dist=True)
    assert torch.equal(FP8.unpack(packed, torch.float32), expected["w.weight"])
    assert torch.equal(packed, FP8.join(codes, FP8.per_row(scales[::128], rows)))
    assert (FP8.unpack(packed, torch.float32) - weight).abs().max() <= weight.abs().max() / 16  # 4 bits of mantissa


@every_format
def test_a_packed_weight_is_packed_again_to_the_same_bytes(form: PackedFormat) -> None:
    packed = form.pack(normal(130, 256))
    again = form.pack(form.unpack(packed, torch.float32))
    if form is FP8:  # values in fp8 times a scale in fp32 are not in bf16
        assert (form.unpack(again, torch.float32) - form.unpack(packed, torch.float32)).abs().max() < 0.3
    else:
        assert torch.equal(form.unpack(again, torch.bfloat16), form.unpack(packed, torch.bfloat16))


@every_format
def test_a_slice_of_the_weight_is_the_slice_of_its_bytes(form: PackedFormat) -> None:
    weight = normal(3, 256, 512)
    packed, blocks = form.pack(weight), 256 // form.block
    assert packed.dtype is torch.uint8 and packed.is_contiguous() and packed.shape == form.packed_shape(weight.shape)
    assert form.weight_shape(packed.shape) == weight.shape
    whole = form.unpack(packed, torch.float32)
    for part in (
        (slice(1, 3),),
        (slice(None), slice(128, 256)),
        (slice(None), slice(None), slice(256, 512)),
    ):
        of_bytes = (*part[:2], slice(blocks, None)) if len(part) == 3 else part
        assert torch.equal(form.pack(weight[part]), packed[of_bytes])
        assert torch.equal(form.unpack(packed[of_bytes], torch.float32), whole[part])
    rows = packed[:, 5:17]  # a shard ends anywhere: unpacking asks for no whole groups
    assert torch.equal(form.unpack(rows, torch.float32), whole[:, 5:17])


@every_format
def test_weights_are_rounded_to_bf16_first_whatever_their_dtype(form: PackedFormat) -> None:
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = form.pack(weight.bfloat16())
    assert torch.equal(form.pack(weight), expected) and torch.equal(form.pack(weight.bfloat16().double()), expected)


@every_format
def test_it_goes_by_chunks_to_the_same_bytes_and_values(form: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(2, 300, 256)
    packed = form.pack(weight)
    whole = form.unpack(packed, torch.bfloat16)
    monkeypatch.setattr(packing, "_CHUNK", 1000)
    assert torch.equal(form.pack(weight), packed) and torch.equal(form.unpack(packed, torch.bfloat16), whole)


@every_format
def test_what_is_no_weight_or_not_packed_is_refused(form: PackedFormat) -> None:
    with pytest.raises(ValueError, match=rf"\(4, 80\) is not made of {form.name} blocks of {form.block} columns"):
        form.pack(torch.zeros(4, 80))
    with pytest.raises(
        ValueError, match=rf"\(4, 2, 33\) is no packed {form.name}, whose last dim is {form.block_bytes}"
    ):
        form.unpack(torch.zeros(4, 2, 33, dtype=torch.uint8), torch.float32)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"nan or inf cannot be packed as {form.name}"):
            form.pack(torch.full((4, 128), value))


@every_format
def test_no_weights_and_meta_ones_have_the_shapes(form: PackedFormat) -> None:
    assert form.pack(torch.empty(0, 256)).shape == form.packed_shape((0, 256))
    meta = form.pack(torch.empty(3, 5, 256, device="meta"))
    assert meta.is_meta and form.unpack(meta, torch.bfloat16).shape == (3, 5, 256)


def test_bits_per_weight() -> None:
    assert {name: 8 * form.block_bytes / form.block for name, form in FORMATS.items()} == {
        "nf4": 4.25,
        "nf4-fp32": 4.5,
        "mxfp4": 4.25,
        "fp8": 8.25,
    }
