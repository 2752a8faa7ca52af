"""Hugging Face folders that are quantized already: bit for bit as bitsandbytes, transformers and torch read them."""

import json
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
import torch.nn as nn
from hf_tiny import tiny_llama
from mutation import write_mutated
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_converter.dcp.reader import SafePlanner, read
from lora_converter.hf import quantized_weights
from lora_converter.hf.pieces import Piece, PieceReader
from lora_converter.hf.quantized import QuantizedFolder, quantization_of
from lora_converter.hf.quantized_reader import PACKED
from lora_converter.packed_formats import FORMATS

Tensors = dict[str, torch.Tensor]
Slices = tuple[slice, ...]

NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_bytes(*shape: int, most: int = 256) -> torch.Tensor:
    return torch.randint(most, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def nf4_tensors(
    weight: torch.Tensor, *, nested: bool = False, block: int = 64, nested_block: int = 256
) -> tuple[Tensors, torch.Tensor]:
    """As bitsandbytes saves a weight, and as it dequantizes it, to fp32.

    Their kernel for CPUs (0.50.2) starts the blocks of a matrix anew in each row. Of a flat weight it computes what
    their other kernels do.
    """
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=block)
    if nested:  # as `compress_statistics`, which has blocks of 256
        state.offset, state.nested = state.absmax.mean(), True
        state.absmax, state.state2 = bitsandbytes.quantize_blockwise(
            state.absmax - state.offset, blocksize=nested_block
        )
    parts = {f"x.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    state.dtype, state.shape = torch.float32, torch.Size([2 * codes.numel()])
    dense = bitsandbytes.dequantize_4bit(codes, state)
    return {"x.weight": codes, **parts}, dense.flatten()[: weight.numel()].view(weight.shape)


def mxfp4_tensors(*shape: int) -> tuple[Tensors, torch.Tensor]:
    *lead, columns = shape
    blocks, scales = any_bytes(*lead, columns // 32, 16), any_bytes(*lead, columns // 32, most=250)
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    return {"x.down_proj_blocks": blocks, "x.down_proj_scales": scales}, dense


def fp8_tensors(rows: int, columns: int, *, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    grid = normal(-(-rows // 128), -(-columns // 128)).abs().to(scale_dtype)
    return {"x.weight": normal(rows, columns).to(torch.float8_e4m3fn), "x.weight_scale_inv": grid}


def found_in(folder: Path) -> QuantizedFolder:
    """What one rank finds and sends to the others."""
    found = quantization_of(folder)
    assert found is not None
    return pickle.loads(pickle.dumps(found))


@dataclass(frozen=True)
class Slice(Piece):
    def target(self) -> torch.Tensor:
        return self.value

    def put(self, piece: torch.Tensor) -> None:
        assert piece is self.value or piece.data_ptr() == self.value.data_ptr()


def read_slices(folder: Path, name: str, slices: list[Slices], dtype: torch.dtype) -> list[torch.Tensor]:
    pieces = []
    for some in slices:
        sizes = tuple(s.stop - s.start for s in some)
        pieces.append(Slice(name, tuple(s.start for s in some), sizes, torch.full(sizes, 77).to(dtype)))
    reader = found_in(folder).reader(HuggingFaceStorageReader(str(folder)))
    read({}, folder, reader, PieceReader(pieces), no_dist=True)
    return [piece.value for piece in pieces]


def some_slices(shape: tuple[int, ...], count: int = 8) -> list[Slices]:
    """The whole, nothing, and parts of it."""
    rng, whole = random.Random(0), tuple(slice(0, size) for size in shape)
    parts = [
        tuple(slice(first := rng.randrange(size), rng.randint(first + 1, size)) for size in shape) for _ in range(count)
    ]
    return [whole, (slice(1, 1), *whole[1:]), *parts]


def check(folder: Path, name: str, dense: torch.Tensor, form: str | None) -> None:
    """Values and packed bytes of any slice are those of the whole, and the whole is what others make of it."""
    found = found_in(folder)
    assert found.shapes == {name: tuple(dense.shape)} and found.formats == ({name: form} if form else {})
    slices = some_slices(tuple(dense.shape))
    for dtype in (torch.float32, torch.bfloat16):
        for some, value in zip(slices, read_slices(folder, name, slices, dtype), strict=True):
            assert torch.equal(value, dense[some].to(dtype)), some
    if form is None:
        assert (
            name + PACKED not in found.reader(HuggingFaceStorageReader(str(folder))).read_metadata().state_dict_metadata
        )
        return
    packing = FORMATS[form]
    shape = packing.packed_shape(tuple(dense.shape))
    slices = [(*some[:-1], slice(0, shape[-1])) for some in some_slices(shape)]
    slices.append((*slices[-1][:-1], slice(3, 7)))
    whole, *parts = read_slices(folder, name + PACKED, slices, torch.uint8)
    assert torch.equal(packing.unpack(whole, torch.float32), dense)
    assert all(torch.equal(part, whole[some]) for part, some in zip(parts, slices[1:], strict=True))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, LlamaForCausalLM]]:
    """Folders that transformers has written, without and with double quantization, and their models."""
    folder = tmp_path_factory.mktemp("llamas")
    tiny_llama().save_pretrained(folder / "dense")
    found = {}
    for nested in (False, True):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
        model = LlamaForCausalLM.from_pretrained(
            folder / "dense", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
        )
        model.save_pretrained(folder / str(nested))
        found[nested] = folder / str(nested), model
    return found


@pytest.mark.parametrize("nested", [False, True])
def test_what_transformers_saves_in_nf4_is_read_as_bitsandbytes_dequantizes_it(
    nested: bool, llamas: dict[bool, tuple[Path, LlamaForCausalLM]]
) -> None:
    folder, model = llamas[nested]
    found = found_in(folder)
    linears = {
        f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    form = "nf4-fp32" if nested else "nf4"
    assert found.scheme == "bitsandbytes NF4" and found.formats == dict.fromkeys(linears, form)
    expected = {
        name: bitsandbytes.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in linears.items()
    }
    others = {
        name: value for name, value in model.state_dict().items() if name.endswith(("norm.weight", "head.weight"))
    }
    wanted = {name: torch.empty_like(value) for name, value in {**expected, **others}.items()}
    packed = {
        n + PACKED: torch.empty(FORMATS[form].packed_shape(v.shape), dtype=torch.uint8) for n, v in expected.items()
    }
    reader = found.reader(HuggingFaceStorageReader(str(folder)))
    assert reader.read_metadata().state_dict_metadata.keys() == {*wanted, *packed, "model.embed_tokens.weight"}
    read(state_dict := {**wanted, **packed}, folder, reader, SafePlanner(), no_dist=True)
    for name, value in {**expected, **others}.items():
        assert torch.equal(state_dict[name], value)
    for name, value in expected.items():
        assert torch.equal(FORMATS[form].unpack(state_dict[name + PACKED], torch.bfloat16), value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(40, 320), (2, 3, 6, 128)])
def test_nf4_in_slices(shape: tuple[int, ...], nested: bool, tmp_path: Path) -> None:
    tensors, dense = nf4_tensors(normal(*shape).bfloat16(), nested=nested)
    check(write(tmp_path, tensors, NF4_CONFIG), "x.weight", dense, "nf4-fp32" if nested else "nf4")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(10, 96), (3, 5, 36), (7, 35)])
def test_nf4_whose_blocks_go_over_the_ends_of_rows_is_read_dequantized(
    shape: tuple[int, ...], nested: bool, tmp_path: Path
) -> None:
    tensors, dense = nf4_tensors(normal(*shape).bfloat16(), nested=nested)
    check(write(tmp_path, tensors, NF4_CONFIG), "x.weight", dense, None)


@pytest.mark.parametrize("nested", [False, True])
def test_larger_blocks_of_nf4_are_blocks_of_64_with_one_absmax(nested: bool, tmp_path: Path) -> None:
    tensors, dense = nf4_tensors(normal(10, 192).bfloat16(), block=128, nested=nested)  # some go over ends of rows
    check(write(tmp_path, tensors, NF4_CONFIG), "x.weight", dense, "nf4-fp32" if nested else "nf4")


def test_blocks_of_absmaxes_may_have_any_size(tmp_path: Path) -> None:
    tensors, dense = nf4_tensors(normal(40, 320).bfloat16(), nested=True, nested_block=64)
    check(write(tmp_path, tensors, NF4_CONFIG), "x.weight", dense, "nf4-fp32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_absmaxes_that_are_not_in_bf16_are_kept_in_fp32_for_the_whole_folder(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    exact, _ = nf4_tensors(normal(8, 64).bfloat16())
    tensors, dense = nf4_tensors(normal(8, 128).to(dtype))
    folder = write(tmp_path, tensors, NF4_CONFIG)
    check(folder, "x.weight", dense, "nf4-fp32")
    write(folder, {**tensors, **{name.replace("x", "a", 1): value for name, value in exact.items()}}, NF4_CONFIG)
    assert found_in(folder).formats == {"a.weight": "nf4-fp32", "x.weight": "nf4-fp32"}
    read_slices(folder, "a.weight" + PACKED, [(slice(0, 8), slice(0, 1), slice(0, 36))], torch.uint8)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 320), (10, 36)])
def test_codes_that_are_stored_as_numbers_of_another_dtype(
    shape: tuple[int, ...], storage: torch.dtype, tmp_path: Path
) -> None:
    """`bnb_4bit_quant_storage`, with which FSDP shards them."""
    tensors, dense = nf4_tensors(normal(*shape).bfloat16())
    tensors["x.weight"] = tensors["x.weight"].flatten().view(storage).unsqueeze(1)
    check(write(tmp_path, tensors, NF4_CONFIG), "x.weight", dense, "nf4" if shape[1] == 320 else None)


def test_mxfp4_in_slices(tmp_path: Path) -> None:
    tensors, dense = mxfp4_tensors(3, 10, 160)
    check(write(tmp_path, tensors, {"quant_method": "mxfp4"}), "x.down_proj_blocks", dense, "mxfp4")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_what_transformers_dequantizes(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = fp8_tensors(256, 384, scale_dtype=scale_dtype)
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128))))
    dense = theirs._dequantize_one(*tensors.values(), output_dtype=torch.float32)
    check(write(tmp_path, tensors, FP8_CONFIG), "x.weight", dense, "fp8")


@pytest.mark.parametrize("shape", [(200, 384), (576, 128), (300, 200), (40, 100)])
def test_fp8_blocks_that_end_early_are_what_torch_reads(shape: tuple[int, int], tmp_path: Path) -> None:
    folder = write(tmp_path, tensors := fp8_tensors(*shape), FP8_CONFIG)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    expected = {"x.weight": torch.empty(shape)}
    read(expected, folder, QuantizedHuggingFaceStorageReader(str(folder)), SafePlanner(), no_dist=True)
    check(folder, "x.weight", expected["x.weight"], "fp8" if shape[1] % 128 == 0 else None)


def test_weights_and_scales_may_be_in_different_files(tmp_path: Path) -> None:
    tensors, dense = nf4_tensors(normal(10, 128).bfloat16(), nested=True)
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        save_file({name: tensors[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    check(tmp_path, "x.weight", dense, "nf4-fp32")


def test_more_rows_than_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_converter.hf.quantized_reader._VALUES", 1000)
    for number, (tensors, dense, form) in enumerate(
        [
            (*nf4_tensors(normal(40, 320).bfloat16()), "nf4"),
            (*nf4_tensors(normal(40, 96).bfloat16()), None),
            (*mxfp4_tensors(3, 40, 64), "mxfp4"),
        ]
    ):
        check(write(tmp_path / str(number), tensors), next(iter(tensors)), dense, form)


def test_no_more_is_read_than_the_blocks_of_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = quantized_weights.Files.read

    def counted(self: quantized_weights.Files, *args: Any) -> torch.Tensor:
        sizes.append((found := original(self, *args)).nbytes)
        return found

    rows = (slice(130, 134), slice(0, 1024))
    for number, (tensors, some, most) in enumerate(
        [
            (nf4_tensors(normal(256, 1024).bfloat16())[0], rows, 4 * 16 * 36),
            (nf4_tensors(normal(256, 1024).bfloat16(), nested=True)[0], rows, 4 * 16 * 33 + 4 * 256 + 8),
            (fp8_tensors(256, 1024), (slice(130, 134), slice(130, 140)), 4 * 128 + 4),
            (mxfp4_tensors(3, 8, 1024)[0], (slice(1, 2), slice(4, 6), slice(70, 80)), 2 * 17),
        ]
    ):
        folder = write(tmp_path / str(number), tensors)
        quantization = found_in(folder)
        with monkeypatch.context() as patch:
            patch.setattr(quantized_weights.Files, "read", counted)
            patch.setattr("test_quantized.found_in", lambda _, known=quantization: known)
            sizes.clear()
            read_slices(folder, next(iter(tensors)), [some], torch.float32)
        assert 0 < sum(sizes) <= most


def test_a_folder_without_quantized_weights_is_none_though_its_config_names_a_scheme_that_is_read(
    tmp_path: Path,
) -> None:
    tensors = {"x.weight": normal(4, 64), "x.position_ids": torch.arange(4), "x.bias": any_bytes(4).bool()}
    for config in (None, NF4_CONFIG, FP8_CONFIG, {"quant_method": "mxfp4"}):
        assert quantization_of(write(tmp_path, tensors, config)) is None


SCHEMES: dict[str, Callable[[], Tensors]] = {
    "bitsandbytes NF4": lambda: nf4_tensors(normal(4, 64).bfloat16())[0],
    "MXFP4": lambda: mxfp4_tensors(2, 4, 64)[0],
    "fp8 in blocks of 128 x 128": lambda: fp8_tensors(4, 128),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_that_has_lost_its_config_is_known_by_its_tensors(scheme: str, tmp_path: Path) -> None:
    (write(tmp_path, SCHEMES[scheme]()) / "config.json").unlink()
    assert found_in(tmp_path).scheme == scheme


INT = any_bytes(8, 8).int()
REFUSED: dict[str, tuple[dict[str, Any] | None, Tensors]] = {
    "bitsandbytes fp4": ({**NF4_CONFIG, "bnb_4bit_quant_type": "fp4"}, {}),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {"x.qweight": INT, "x.qzeros": INT.clone()}),
    "AWQ": ({"quant_method": "awq", "bits": 4}, {"x.qweight": INT, "x.qzeros": INT.clone()}),
    "quant_method 'hqq'": ({"quant_method": "hqq"}, {}),
    "quant_method ['fp8']": ({"quant_method": ["fp8"]}, {}),
    "quant_method None": ({"bits": 4}, {}),
    "fp8 and weight_block_size None": ({"quant_method": "fp8", "weight_block_size": None}, {}),
    "GPTQ or AWQ": (None, {"x.qweight": INT}),
    "compressed-tensors, FBGEMM or ModelOpt": (None, {"x.weight": any_bytes(4, 4), "x.weight_scale": INT}),
    "bitsandbytes NF4 and MXFP4": (None, {**nf4_tensors(normal(4, 64))[0], **mxfp4_tensors(2, 4, 64)[0]}),
}


@pytest.mark.parametrize("scheme", REFUSED)
def test_other_schemes_are_refused_by_name(scheme: str, tmp_path: Path) -> None:
    config, tensors = REFUSED[scheme]
    folder = write(tmp_path, {"x.bias": normal(4), **tensors}, config)
    with pytest.raises(ValueError) as error:
        quantization_of(folder)
    assert str(error.value) == (
        f"{folder} is quantized with {scheme}, which is not read; what is read: bitsandbytes NF4, MXFP4, fp8 in blocks "
        'of 128 x 128. Name an unquantized copy of the model: lora.base_format = "nf4" packs it while it is read.'
    )
    (folder / "config.json").unlink()  # as its unquantized copy
    assert quantization_of(write(folder, {"x.weight": normal(4, 64)})) is None


def test_what_bitsandbytes_saves_otherwise_is_refused_by_its_tensors(tmp_path: Path) -> None:
    codes, state = bitsandbytes.quantize_4bit(normal(4, 64), quant_type="fp4", blocksize=64)
    parts = {f"x.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match="with bitsandbytes fp4, which"):
        quantization_of(write(tmp_path, {"x.weight": codes, **parts}))
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(normal(4, 64).half())
    with pytest.raises(ValueError, match="with bitsandbytes int8, which"):
        quantization_of(write(tmp_path, {"x.weight": codes, "x.SCB": scales}))
    tensors, _ = nf4_tensors(normal(4, 64), block=32)
    with pytest.raises(ValueError, match=r"nf4 is nf4 in blocks of 32; NF4 is read in blocks of 64, 128, "):
        quantization_of(write(tmp_path, tensors))


@pytest.mark.parametrize("scheme", [*SCHEMES, "nested"])
def test_a_tensor_that_is_missing_or_of_another_size_is_named(scheme: str, tmp_path: Path) -> None:
    nested = lambda: nf4_tensors(normal(4, 64).bfloat16(), nested=True)[0]  # noqa: E731
    tensors = SCHEMES.get(scheme, nested)()
    for name, value in tensors.items():
        rest = {other: kept for other, kept in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"is not complete: {name} is missing"):
            quantization_of(write(tmp_path, rest))
        for damaged in (value.flatten()[:-1], value[:0], value.unsqueeze(0), value.double()):
            with pytest.raises(ValueError, match=f"is damaged: .*{name}[: ]|{name} holds codes"):
                quantization_of(write(tmp_path, {**rest, name: damaged}))


def test_codes_of_half_a_byte_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, nf4_tensors(normal(4, 64).bfloat16())[0]) / "model.safetensors"
    data, (old, new) = file.read_bytes(), (b'"U8","shape":[128,1]', b'"F4","shape":[256,1]')
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=r"is damaged: x\.weight: it is F4 \[256, 1\], and holds no weight"):
        quantization_of(tmp_path)


def test_mxfp4_has_blocks_of_16_bytes_in_rows(tmp_path: Path) -> None:
    tensors, _ = mxfp4_tensors(2, 4, 64)
    blocks, scales = tensors["x.down_proj_blocks"], tensors["x.down_proj_scales"]
    for cut in ((blocks[..., :8].clone(), scales), (blocks[0, 0].clone(), scales[0, 0].clone())):
        with pytest.raises(ValueError, match=r"is damaged: x\.down_proj_blocks: it is U8 .*no blocks of 16 bytes"):
            quantization_of(write(tmp_path, dict(zip(tensors, cut, strict=True))))


def test_codes_with_nothing_beside_them_are_refused(tmp_path: Path) -> None:
    for name in ("x.weight", "x.down_proj_blocks"):
        with pytest.raises(ValueError, match=f"{name} holds codes|{name.replace('blocks', 'scales')} is missing"):
            quantization_of(write(tmp_path, {name: any_bytes(2, 4, 2, 16)}))


def state(**fields: object) -> torch.Tensor:
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64], **fields}
    return torch.frombuffer(bytearray(json.dumps(whole).encode()), dtype=torch.uint8)


NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    "damaged",
    [
        state(shape=[4, 10**12]),
        state(shape=[10**4000, 10**4000][:1] * 2)[:4097],
        state(shape=[-4, -64]),
        state(shape=[True, 256]),
        state(shape=[256]),
        state(shape="4, 64"),
        state(shape=None),
        state(blocksize=10**9),
        state(blocksize="64"),
        state(blocksize=[64]),
        state(quant_type="fp4"),
        state(**NESTED),
        any_bytes(100),
        torch.frombuffer(bytearray(b"[" * 4000), dtype=torch.uint8),
        torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8),
        torch.cat([state(), torch.full((5000,), ord(" "), dtype=torch.uint8)]),
        torch.zeros(0, dtype=torch.uint8),
    ],
)
def test_what_a_quant_state_says_is_compared_with_the_files(damaged: torch.Tensor, tmp_path: Path) -> None:
    tensors, _ = nf4_tensors(normal(4, 64).bfloat16())
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = damaged
    with pytest.raises(ValueError, match=r"x\.weight"):
        quantization_of(write(tmp_path, tensors))


@pytest.mark.parametrize(
    "field",
    [
        {"nested_blocksize": 0},
        {"nested_blocksize": 2.0},
        {"nested_blocksize": 1},
        {"nested_dtype": "float16"},
        {"nested_offset": float("nan")},
        {"nested_offset": "0"},
    ],
    ids=str,
)
def test_what_a_quant_state_says_of_nested_absmaxes_is_checked(field: dict[str, object], tmp_path: Path) -> None:
    tensors, _ = nf4_tensors(normal(8, 64).bfloat16(), nested=True)
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = state(**{**NESTED, "shape": [8, 64], **field})
    with pytest.raises(ValueError, match=r"x\.weight"):
        quantization_of(write(tmp_path, tensors))


def test_other_values_than_nf4s_are_refused(tmp_path: Path) -> None:
    tensors, _ = nf4_tensors(normal(4, 64).bfloat16())
    tensors["x.weight.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(ValueError, match=r"x\.weight\.quant_map: it is not NF4's"):
        quantization_of(write(tmp_path, tensors))


def test_a_file_that_has_changed_since_it_was_looked_at_is_named(tmp_path: Path) -> None:
    tensors, _ = nf4_tensors(normal(4, 64).bfloat16())
    found = found_in(write(tmp_path, tensors))
    write(tmp_path, {**tensors, "x.weight.absmax": torch.ones(3)})
    reader = found.reader(HuggingFaceStorageReader(str(tmp_path)))
    with pytest.raises(ValueError, match=r"is not the file that it was: x\.weight\.absmax has another dtype or shape"):
        read({"x.weight": torch.empty(4, 64)}, tmp_path, reader, SafePlanner(), no_dist=True)


def test_damaged_folders_are_read_or_refused(tmp_path: Path) -> None:
    logging.disable()
    rng = random.Random(0)
    refused = 0
    for number, tensors in enumerate(
        make() for make in (*SCHEMES.values(), lambda: nf4_tensors(normal(4, 64), nested=True)[0])
    ):
        path = write(tmp_path / str(number), tensors) / "model.safetensors"
        whole = path.read_bytes()
        for _ in range(100):
            write_mutated(path, whole, rng)
            try:
                if (found := quantization_of(path.parent)) and found.shapes:
                    wanted = {name: torch.empty(shape) for name, shape in found.shapes.items()}
                    reader = found.reader(HuggingFaceStorageReader(str(path.parent)))
                    read(wanted, path.parent, reader, SafePlanner(), no_dist=True)
            except ValueError as error:
                assert str(path.parent) in str(error)
                refused += 1
    logging.disable(logging.NOTSET)
    assert 120 < refused < 400
