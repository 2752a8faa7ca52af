"""torchao's 8-bit AdamW through torchtitan's own seam (docs/which_rank.md): it trains, and goes on from its steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import train
from torchao.optim import AdamW8bit
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.protocols import train_spec

RANK = "--lora.rank=64"  # torchao packs what has 4,096 elements or more


def build_8bit(model_parts: Any, config: Any, parallel_dims: Any, ft_manager: Any = None) -> OptimizersContainer:
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    return OptimizersContainer(model_parts, AdamW8bit, options)


@pytest.fixture
def eight_bit() -> Iterator[str]:
    """A model name. torchao compiles its step; it is the same uncompiled."""
    spec = dataclasses.replace(train_spec.get_train_spec("llama3"), build_optimizers_fn=build_8bit)
    train_spec.register_train_spec("llama3_8bit", spec)
    with torch.compiler.set_stance("force_eager"):
        yield "--model.name=llama3_8bit"
    del train_spec._extra_train_specs["llama3_8bit"]


def test_adapters_train_with_8_bit_moments_into_a_peft_directory(eight_bit: str, hf_base: Path, tmp_path: Path) -> None:
    """Losses within 0.1 % of AdamW's, which 3 steps took from 5.91 to 5.28."""
    on = [RANK, f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    plain = train(tmp_path / "plain", *on, "--training.steps=4")
    saved = ["--checkpoint.interval=2", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    run = train(tmp_path / "run", eight_bit, *on, *saved, "--training.steps=4")
    moments = [state["exp_avg"] for state in run.trainer.optimizers.optimizers[0].state.values()]
    assert {type(moment).__name__ for moment in moments if moment.numel() >= 4096} == {"OptimState8bit"}
    torch.testing.assert_close(run.losses, plain.losses, rtol=1e-3, atol=0)
    assert (tmp_path / "run" / "checkpoint" / "step-4" / "adapter_model.safetensors").exists()


def test_its_steps_are_resumed(eight_bit: str, hf_base: Path, tmp_path: Path) -> None:
    """Stored as what they stand for, moments are rounded to 8 bits again: torchao's map has 1 and no -1."""
    on = [RANK, f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    on += [eight_bit, "--checkpoint.interval=2", "--lr_scheduler.total_steps=8"]
    whole = train(tmp_path / "whole", *on, "--training.steps=4")
    train(tmp_path / "run", *on, "--training.steps=2")
    again = train(tmp_path / "run", *on, "--training.steps=4")
    torch.testing.assert_close(again.losses, whole.losses[2:], rtol=1e-4, atol=0)
    pairs = zip(*(run.trainer.optimizers.optimizers[0].state.values() for run in (whole, again)), strict=True)
    for expected, found in pairs:
        assert type(found["exp_avg"]) is type(expected["exp_avg"])
