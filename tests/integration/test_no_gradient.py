"""Parameters that never got a gradient: their steps can be resumed, and they start when they get one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Run, adapter_state, build, finish

STEPS = ["--checkpoint.interval=2", "--training.steps=4", "--checkpoint.keep_latest_k=0"]


def cut(run: Run, *, until: int = 10**9) -> None:
    """wq of layer 1 leaves its adapter out, in the steps up to `until`."""
    wq = run.trainer.model_parts[0].layers["1"].attention.wq
    with_adapter = wq.forward
    wq.forward = lambda x: F.linear(x, wq.weight) if run.trainer.step <= until else with_adapter(x)


def options(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *STEPS]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_they_start_afresh_in_a_resumed_run(
    name: str, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = [*options(hf_base), f"--optimizer.name={name}"]
    whole = build(tmp_path / "whole", *job)
    cut(whole, until=2)
    finish(whole)
    told = "2 parameters never got a gradient, and are saved without optimizer state"
    assert caplog.text.count(told) == 1 and "layers.1.attention.wq.lora_a.weight" in caplog.text

    first = build(tmp_path / "parts", *job, "--training.steps=2", "--lr_scheduler.total_steps=4")
    cut(first)
    finish(first)
    second = build(tmp_path / "parts", *job)
    finish(second)
    assert second.losses == whole.losses[2:]
    expected, found = adapter_state(whole), adapter_state(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert found["layers.1.attention.wq.lora_b.weight"].any()


def test_they_may_stay_without_one(hf_base: Path, tmp_path: Path) -> None:
    first = build(tmp_path, *options(hf_base), "--training.steps=2", "--lr_scheduler.total_steps=4")
    cut(first)
    finish(first)
    second = build(tmp_path, *options(hf_base))
    cut(second)
    finish(second)
    third = build(tmp_path, *options(hf_base), "--training.steps=6")
    finish(third)
    assert len(second.losses) == len(third.losses) == 2
