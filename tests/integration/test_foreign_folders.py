"""Bases from elsewhere, through the trainer and the command: which files count, and what a merge makes of them."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import build, finish, full_state, train
from hf_tiny import tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_converter.cli import main
from lora_converter.merge import merge_directories
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE

TOKENS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def peft_adapter(
    folder: Path, base: Path, *, model: LlamaForCausalLM | None = None, save_embeddings: bool = False, **options: Any
) -> torch.Tensor:
    """An adapter that PEFT made and saved, and the logits with it."""
    model = model or tiny_llama()
    model.name_or_path = str(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for number, (name, param) in enumerate(model.named_parameters()):
            if "lora_" in name:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(
        folder, save_embedding_layers=save_embeddings or "lm_head" in options.get("target_modules", ())
    )
    return logits(model)


# A base folder is what its index says


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A base in shards, with what lies about in downloaded folders."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base, max_shard_size="300KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    return base


def litter(base: Path) -> None:
    for name in ("model-00009-of-00009.safetensors", "consolidated.safetensors", WEIGHTS_FILE):
        save_file({"model.norm.weight": torch.full((64,), 7.0), "stray": torch.ones(2)}, base / name)
    (base / CONFIG_FILE).write_text("{}")
    for name in ("model.gguf", "flax_model.msgpack", "model.onnx", "tf_model.h5", "pytorch_model.bin", "x.pt", "y.pth"):
        (base / name).write_bytes(b"not read")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_mine.py", "LICENSE"):
        (base / name).write_text("{}")
    for name in (
        "original/params.json",
        "deep/er/code.py",
        "original/tok.model",
        ".git/HEAD",
        ".cache/x",
        "onnx/m.onnx",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("x")


def test_a_job_reads_the_files_of_the_index_alone(
    sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = build(tmp_path / "clean", *on(sharded))
    clean.trainer.checkpointer.load()
    litter(sharded)
    run = build(tmp_path / "run", *on(sharded))
    run.trainer.checkpointer.load()
    expected, found = full_state(clean), full_state(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "not part of the model, and left out: adapter_model.safetensors, consolidated.safetensors" in caplog.text
    for one in (clean, run):
        one.trainer.close()


def test_a_shard_that_is_missing_is_named_by_the_job_and_by_the_merge(sharded: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", sharded)
    lost = sorted(sharded.glob("model-*.safetensors"))[-1]
    assert not any("q_proj" in key for key in load_file(lost))  # no target is in it
    lost.unlink()
    run = build(tmp_path / "run", *on(sharded))
    with pytest.raises(ValueError, match=f"is not complete: {lost.name} of model.safetensors.index.json is missing"):
        run.trainer.checkpointer.load()
    run.trainer.close()
    with pytest.raises(ValueError, match=f"is not complete: {lost.name}"):
        merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "which is not in its folder"),
        ({"weight_map": ["a"]}, "is damaged: its weight_map is no table"),
        ({}, "is damaged: its weight_map is no table"),
    ],
)
def test_an_index_that_is_none_is_refused(index: dict, message: str, sharded: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")


def test_a_merged_folder_has_all_that_loading_needs_and_no_other_weights(
    sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = peft_adapter(tmp_path / "adapter", sharded)
    litter(sharded)
    merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")
    found = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    shards = {path.name for path in sharded.glob("model-*-of-0000[!9].safetensors")}
    assert found == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "lora_merge.json", "tokenizer.json",
        "chat_template.jinja", "modeling_mine.py", "LICENSE", "original/params.json", "deep/er/code.py",
        "original/tok.model",
    }  # fmt: skip
    told = next(text for text in caplog.messages if text.startswith("Not copied into the merged model"))
    for name in (".cache/", ".git/", "adapter_config.json", "consolidated.safetensors", "model.gguf", "onnx/m.onnx"):
        assert name in told
    (tmp_path / "merged" / "generation_config.json").unlink()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


# Numbers


def test_what_does_not_fit_into_the_dtype_is_not_merged(hf_base: Path, tmp_path: Path, capsys: Any) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    tensors[next(key for key in tensors if "lora_B" in key)] += 1e6
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    command = [
        "merge",
        "--base",
        str(hf_base),
        "--adapter",
        str(tmp_path / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--dtype", "float16"]) == 1
    error = capsys.readouterr().err
    assert "q_proj.weight does not fit into float16: of " in error and "Name a wider --dtype" in error
    assert str(tmp_path / "adapter") in error and str(hf_base) in error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--dtype", "bfloat16"]) == 0


def test_factors_that_hold_nan_are_not_merged(hf_base: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"the factors of .*q_proj hold nan or inf"):
        merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_than_the_adapter_names_is_warned_of_once(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft_adapter(tmp_path / "adapter", Path("meta-llama/Llama-9"))
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    assert caplog.text.count("was made for the base 'meta-llama/Llama-9', and is merged into") == 1
    shutil.copytree(hf_base, tmp_path / "llama-9")
    caplog.clear()
    merge_directories(tmp_path / "llama-9", tmp_path / "adapter", tmp_path / "again")
    assert "was made for the base" not in caplog.text


def test_a_merge_at_the_end_that_fails_is_tried_once(hf_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_converter.run import run as lora_run

    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(lora_run, "merge_directories", fail)
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged"]
    run = build(tmp_path, *on(hf_base), *end)
    with pytest.raises(OSError, match="no space"):
        finish(run)
    run.trainer.checkpointer.close()
    run.trainer.checkpointer.__del__()
    assert len(calls) == 1


@pytest.mark.slow
def test_a_step_of_a_model_that_a_module_of_the_users_registers_is_exported(hf_base: Path, tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torchtitan.models.llama3 import TransformerModelArgs, llama3_args\n"
        "llama3_args['mine'] = TransformerModelArgs(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=320,\n"
        "                                           multiple_of=96, rope_theta=500000)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        train(tmp_path / "run", *on(hf_base), "--model.flavor=mine", "--experimental.custom_import=my_models")
    finally:
        sys.path.remove(str(tmp_path))
    step = tmp_path / "run" / "checkpoint" / "step-3"
    described = json.loads((step / "lora.json").read_text())
    assert described["custom_import"] == "my_models"
    command = [str(Path(sys.executable).with_name("lora-converter")), "export", "--checkpoint", str(step), "--output"]
    env = dict(os.environ)

    def export(name: str, *more: str, path: str = "") -> subprocess.CompletedProcess[str]:
        here = {**env, "PYTHONPATH": path} if path else env
        return subprocess.run(
            [*command, str(tmp_path / name), *more], cwd=tmp_path, env=here, capture_output=True, text=True
        )

    recorded = export("recorded", path=str(tmp_path))
    assert recorded.returncode == 0 and "Importing my_models, which registers llama3 mine" in recorded.stderr
    lost = export("lost")
    assert lost.returncode == 1 and "my_models cannot be imported" in lost.stderr and "--import" in lost.stderr
    named = export("named", "--import", "my_models")
    assert named.returncode == 0, named.stderr
    del described["custom_import"]
    (step / "lora.json").write_text(json.dumps(described))
    unknown = export("unknown")
    assert unknown.returncode == 1 and "has no model 'llama3' 'mine'. If a module of yours" in unknown.stderr
