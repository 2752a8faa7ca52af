"""Parameters that never got a gradient: their steps can be resumed, and they start when they get one."""

from pathlib import Path

import pytest
import torch
from harness import adapter_state, build, finish
from no_gradient import STEPS, cut, whole_and_resumed


def options(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


@pytest.mark.parametrize("name", ["AdamW", pytest.param("Adam", marks=pytest.mark.slow)])
def test_they_start_afresh_in_a_resumed_run(
    name: str, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, second = whole_and_resumed(tmp_path, *options(hf_base), f"--optimizer.name={name}")
    told = "2 parameters never got a gradient, and are saved without optimizer state"
    assert caplog.text.count(told) == 2 and "layers.1.attention.wq.lora_a.weight" in caplog.text  # in each first launch
    assert second.losses == whole.losses[2:]
    expected, found = adapter_state(whole), adapter_state(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert found["layers.1.attention.wq.lora_b.weight"].any()


def test_they_may_stay_without_one(hf_base: Path, tmp_path: Path) -> None:
    first = build(tmp_path, *options(hf_base), *STEPS, "--training.steps=2", "--lr_scheduler.total_steps=4")
    cut(first, until=4)
    finish(first)
    second = build(tmp_path, *options(hf_base), *STEPS)
    cut(second, until=4)
    finish(second)
    third = build(tmp_path, *options(hf_base), *STEPS, "--training.steps=6")
    finish(third)
    assert len(second.losses) == len(third.losses) == 2
