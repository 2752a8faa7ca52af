"""Runs on packed bases, against the same runs on the bases that other libraries dequantise."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from harness import BASE_CONFIG, Run, adapter_state, build, full_state, train
from hf_tiny import save_tiny_llama
from memory import Made
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, WIDE, WIDE_LLAMA
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_converter import fingerprint as fingerprints
from lora_converter import packed as packed_room
from lora_converter.dcp import twins
from lora_converter.dcp.reader import read_metadata
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_module import packed_formats

Tensors = dict[str, torch.Tensor]

NF4, AS_RELEASED = "--lora.base_format=nf4", "--lora.base_format=as-released"
EXPERTS_TOO = "--lora.target_modules=all-linear,experts"


def on(base: Path, *options: str) -> tuple[str, ...]:
    return (*WIDE, f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *options)


def save(folder: Path, tensors: Tensors, config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def linears_of(weights: Tensors) -> Tensors:
    """Those of a Hugging Face Llama that are packed."""
    return {n: w for n, w in weights.items() if w.ndim == 2 and "embed" not in n and "lm_head" not in n}


def through_nf4(weight: torch.Tensor, *, nested: bool = False) -> tuple[Tensors, torch.Tensor]:
    """What bitsandbytes stores of a weight, and what it makes of that."""
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    stored = {"": codes, **{f".{name}": value for name, value in state.as_dict(packed=True).items()}}
    state.dtype = torch.float32
    return stored, bnb.dequantize_4bit(codes, state)


def same_runs(run: Run, expected: Run) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=1e-6)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6)
    theirs = adapter_state(expected)
    for name, value in adapter_state(run).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)


def formats_of(run: Run) -> set[str]:
    return set(packed_formats(run.trainer.model_parts[0]).values())


def fingerprint(run: Run) -> str:
    return run.trainer.checkpointer.run.model.base_fingerprint


def save_wide_base(folder: Path) -> Path:
    """A Llama of tiny_wide's size. Its embedding holds what bf16 can, as most bases' do."""
    save_tiny_llama(folder, **WIDE_LLAMA)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].bfloat16().float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_base(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps on it, packed, each of them saved."""
    return train(tmp_path_factory.mktemp("packed"), *on(base, NF4, "--checkpoint.interval=1"))


def dequantised(base: Path, folder: Path) -> Path:
    """The base as bitsandbytes dequantises it."""
    weights = load_file(base / "model.safetensors")
    weights |= {n: through_nf4(w.bfloat16())[1] for n, w in linears_of(weights).items()}
    return save(folder, weights)


def test_a_run_is_that_on_the_base_that_bitsandbytes_dequantises(packed: Run, base: Path, tmp_path: Path) -> None:
    same_runs(packed, train(tmp_path / "run", *on(dequantised(base, tmp_path / "base"))))
    assert formats_of(packed) == {"nf4"}


def test_so_it_is_in_bf16(base: Path, tmp_path: Path) -> None:
    """Beside packed weights the embedding is stored in bf16, and looked up in fp32, as it was."""
    bf16 = ("--training.mixed_precision_param=bfloat16", "--training.steps=2")
    folder = dequantised(base, tmp_path / "base")
    run, expected = (train(tmp_path / name, *on(folder, *bf16, *form)) for name, form in (("1", [NF4]), ("2", [])))
    same_runs(run, expected)
    (packed, dense) = (each.trainer.model_parts[0].tok_embeddings for each in (run, expected))
    assert packed.weight.dtype is torch.bfloat16 and dense.weight.dtype is torch.float32
    assert packed(torch.tensor([1])).dtype is torch.float32


def test_its_base_is_known_by_what_was_packed(packed: Run, base: Path, tmp_path: Path) -> None:
    dense = build(tmp_path, *on(base))
    dense.trainer.checkpointer.load()
    dense.trainer.close()
    assert fingerprint(packed) == fingerprint(dense)


def test_a_step_holds_adapters_alone_and_is_resumed(packed: Run, base: Path, tmp_path: Path) -> None:
    folder = Path(packed.trainer.job_config.job.dump_folder)
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint/step-3")
    stored = read_metadata(folder / "checkpoint/step-3").state_dict_metadata
    assert not stored.keys() & packed.trainer.checkpointer.run.model.base.state_dict().keys()
    again = train(tmp_path / "run", *on(base, NF4))
    assert again.losses == packed.losses[2:]
    theirs = adapter_state(packed)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter_state(again).items())


def test_a_dcp_base_is_packed_as_a_folder_of_hugging_face(packed: Run, base: Path, tmp_path: Path) -> None:
    train(tmp_path / "base", *on(base, "--training.steps=1", "--optimizer.lr=0"), config=BASE_CONFIG)
    dcp = f"--checkpoint.initial_load_path={tmp_path}/base/checkpoint/step-1"
    run = build(tmp_path / "run", *WIDE, dcp, NF4)
    run.trainer.checkpointer.load()
    run.trainer.close()
    theirs, ours = (full_state(each) for each in (packed, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in packed_formats(run.trainer.model_parts[0]))
    assert fingerprint(run) == fingerprint(packed)


def test_no_more_than_a_few_modules_are_dense_at_a_time(base: Path, tmp_path: Path) -> None:
    """Everything that the load makes: a twin, of the folder (fp32) two tensors, what packing takes."""
    run = build(tmp_path, *on(base, NF4))
    model = run.trainer.model_parts[0]
    largest = 2 * 384 * 128  # of one module, bf16
    small = [(twins, "_AT_A_TIME", largest), (packed_room, "_CHUNK", 2**12)]
    small += [(fingerprints, "_ELEMENTS_AT_A_TIME", {"cpu": 2**12})]
    with ExitStack() as stack:
        for room, name, value in small:
            stack.enter_context(mock.patch.object(room, name, value))
        made = stack.enter_context(Made(*model.parameters(), *model.buffers()))
        run.trainer.checkpointer.load()
    run.trainer.close()
    formats, state = packed_formats(model), full_state(run)
    every = sum(2 * prod(FORMATS[form].weight_shape(state[name].shape)) for name, form in formats.items())
    assert every > 10 * largest
    assert largest < made.peak < (1 + 2 + 2) * largest


@pytest.mark.parametrize("form", ["", "nf4", "as-released"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_of_bitsandbytes_keeps_its_values(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, nested: bool, form: str
) -> None:
    """With double quantisation, and without: absmaxes of weights in bf16 are exact in bf16."""
    caplog.set_level("INFO")
    weights = load_file(base / "model.safetensors")
    stored, dense = dict(weights), dict(weights)
    for name, weight in linears_of(weights).items():
        parts, dense[name] = through_nf4(weight.bfloat16(), nested=nested)
        stored |= {f"{name}{part}": value for part, value in parts.items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    short = "--training.steps=2"
    run = train(tmp_path / "1", *on(save(tmp_path / "stored", stored, config), f"--lora.base_format={form}", short))
    expected = train(tmp_path / "2", *on(save(tmp_path / "dense", dense), short))
    same_runs(run, expected)
    assert formats_of(run) == (({"nf4-fp32"} if nested else {"nf4"}) if form else set())
    assert ("so they are kept in fp32" in caplog.text) == (nested and form != "")
    assert fingerprint(run) == fingerprint(expected)


def mxfp4(weights: Tensors) -> tuple[Tensors, Tensors]:
    """gpt_oss's experts, whose names end as the published ones, as any codes, and as transformers reads these."""
    generator = torch.Generator().manual_seed(0)
    stored, dense = dict(weights), dict(weights)
    for name in [name for name in weights if name.endswith("_blocks")]:
        *lead, columns = weights[name].shape
        stored[name] = torch.randint(256, (*lead, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 123, (*lead, columns // 32), dtype=torch.uint8, generator=generator)
        stored[name.replace("_blocks", "_scales")] = scales
        dense[name] = convert_moe_packed_tensors(stored[name], scales, dtype=torch.float32).transpose(1, 2)
    return stored, dense


def fp8(weights: Tensors) -> tuple[Tensors, Tensors]:
    """deepseek_v3's linears in blocks of 128 x 128."""
    stored, dense = dict(weights), dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            continue
        rows, columns = weight.shape
        grid = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(rows)) + 0.5
        scales = grid.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        stored[name], stored[f"{name}_scale_inv"] = (weight / scales).to(torch.float8_e4m3fn), grid
        dense[name] = stored[name].float() * scales
    return stored, dense


@pytest.mark.parametrize(
    ("model", "quantised", "config", "form"),
    [
        ("gpt_oss", mxfp4, {"quant_method": "mxfp4"}, "mxfp4"),
        ("deepseek_v3", fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_what_a_folder_has_packed_stays_so(
    tmp_path: Path, model: str, quantised: Callable[[Tensors], tuple[Tensors, Tensors]], config: dict, form: str
) -> None:
    random = build(tmp_path / "0", *MODELS[model], *WIDE, "--checkpoint.initial_load_path=")
    run = random.trainer.checkpointer.run
    stored, dense = quantised(run.host.state_dict_adapter.to_hf(dict(run.model.base.state_dict())))
    random.trainer.close()
    common = (*MODELS[model], "--training.steps=2", EXPERTS_TOO)
    packed = train(tmp_path / "1", *on(save(tmp_path / "stored", stored, config), *common, AS_RELEASED))
    expected = train(tmp_path / "2", *on(save(tmp_path / "dense", dense), *common))
    same_runs(packed, expected)
    assert formats_of(packed) == {form} and fingerprint(packed) == fingerprint(expected)
