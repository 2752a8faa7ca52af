"""What messages about DoRA ask for, done."""

from pathlib import Path

import pytest
from harness import build, train
from hf_models import HF_MODELS, save_hf

from lora_converter.cli import main
from lora_converter.hf.magnitudes import NO_VLLM


def options(base: Path, *more: str) -> list[str]:
    own = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", "--lora.use_dora"]
    return [*own, "--checkpoint.last_save_model_only", *more]


def test_experts_are_taken_out_or_it_is_set_to_false(tmp_path: Path) -> None:
    base = save_hf("qwen3_moe", tmp_path / "base")
    job = [*HF_MODELS["qwen3_moe"].options, *options(base)]
    experts = "--lora.target_modules=all-linear,experts"
    with pytest.raises(
        ValueError, match=r"lora.use_dora = true: adapters on routed experts have no magnitude"
    ) as error:
        build(tmp_path / "run", *job, experts)
    assert "Set it to false, or take experts out of lora.target_modules." in str(error.value)
    build(tmp_path / "run", *job, experts, "--lora.no-use_dora").trainer.close()
    build(tmp_path / "run", *job).trainer.close()


def test_linears_beside_experts_are_excluded_or_it_is_set_to_false(tmp_path: Path) -> None:
    base = save_hf("deepseek_v3", tmp_path / "base")
    job = [*HF_MODELS["deepseek_v3"].options, *options(base, "--checkpoint.last_save_in_hf")]
    every = "--lora.target_modules=all-linear"
    with pytest.raises(ValueError, match=r"use_dora = true: .*mlp.* stand beside routed experts") as error:
        build(tmp_path / "run", *job, every)
    assert "Name them in lora.exclude_modules, or set use_dora = false." in str(error.value)
    excluded = "--lora.exclude_modules=*.feed_forward.*,*.shared_experts.*"
    build(tmp_path / "run", *job, every, excluded).trainer.close()
    build(tmp_path / "run", *job, every, "--lora.no-use_dora").trainer.close()


def test_a_packed_base_has_no_magnitudes(hf_base: Path, tmp_path: Path) -> None:
    job = options(hf_base, "--lora.base_format=nf4")
    with pytest.raises(ValueError, match=r"lora.use_dora = true: .* is packed or has a product of its own") as error:
        build(tmp_path / "run", *job)
    assert "Set lora.use_dora = false, or name it in lora.exclude_modules." in str(error.value)
    build(tmp_path / "run", *job, "--lora.no-use_dora").trainer.close()


def test_for_vllm_it_is_merged_and_a_step_is_exported_beside_its_base(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", *options(hf_base, "--checkpoint.last_save_in_hf"))
    assert NO_VLLM in caplog.messages and "For vLLM merge it" in NO_VLLM
    adapter = str(tmp_path / "run" / "checkpoint" / "step-3")
    assert main(["merge", "--base", str(hf_base), "--adapter", adapter, "--output", str(tmp_path / "merged")]) == 0
    train(tmp_path / "steps", *options(hf_base), "--checkpoint.no-last_save_model_only")
    step, output = tmp_path / "steps" / "checkpoint" / "step-3", str(tmp_path / "adapter")
    export = ["export", "--checkpoint", str(step), "--output", output]
    assert main([*export, "--base", "some/base"]) == 1
    assert "Name the Hugging Face folder of the base with --base" in capsys.readouterr().err
    other = save_hf("qwen3", tmp_path / "other")
    assert main([*export, "--base", str(other)]) == 1
    assert "Name the base of the run with --base" in capsys.readouterr().err
    assert main([*export, "--base", str(hf_base)]) == 0
