"""A run that goes on takes the rates of its TOML file as it is now, at the step where its schedule is."""

import logging
from pathlib import Path

import pytest
import torch
from harness import adapter_state, build, finish, train

LAUNCH = ["--checkpoint.interval=2", "--lr_scheduler.warmup_steps=2", "--lr_scheduler.total_steps=8"]
DETERMINISTIC = "--debug.deterministic"


@pytest.fixture(autouse=True)
def _deterministic_algorithms_off_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *LAUNCH]


def test_a_new_rate_is_used_from_the_first_step_on_and_said_in_one_line(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path / "whole", *on(hf_base), "--training.steps=6", "--optimizer.lr=1e-3")
    train(tmp_path / "run", *on(hf_base), "--training.steps=2", "--optimizer.lr=1e-3", "--optimizer.weight_decay=0.1")
    caplog.set_level(logging.INFO)
    others = ["--optimizer.weight_decay=0", "--optimizer.beta2=0.9", "--optimizer.eps=1e-6"]
    lower = build(tmp_path / "run", *on(hf_base), "--training.steps=6", "--optimizer.lr=1e-5", *others)
    finish(lower)
    # The schedule goes on where it was: the same factors, on the new base.
    torch.testing.assert_close(torch.tensor(lower.lrs), torch.tensor(whole.lrs[2:]) / 100)
    group = lower.trainer.optimizers.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-5, 0, (0.9, 0.9), 1e-6)
    assert lower.trainer.lr_schedulers.schedulers[0].base_lrs == [1e-5]
    told = [text for text in caplog.messages if " -> " in text and text.startswith("LoRA: optimizer.")]
    assert sorted(told) == [
        "LoRA: optimizer.beta1, beta2 0.9, 0.95 -> 0.9, 0.9",
        "LoRA: optimizer.eps 1e-08 -> 1e-06",
        "LoRA: optimizer.lr 0.001 -> 1e-05",
        "LoRA: optimizer.weight_decay 0.1 -> 0",
    ]
    caplog.clear()
    again = build(tmp_path / "run", *on(hf_base), "--training.steps=7", "--optimizer.lr=1e-5", *others)
    again.trainer.checkpointer.load()
    assert not [text for text in caplog.messages if " -> " in text and text.startswith("LoRA: optimizer.")]
    again.trainer.close()


def test_a_rate_of_nearly_nothing_stops_a_run_that_diverges(hf_base: Path, tmp_path: Path) -> None:
    """The README's remedy: launch again at a good step with a lower rate."""
    first = train(tmp_path, *on(hf_base), "--training.steps=2")
    before = adapter_state(first)
    frozen = build(tmp_path, *on(hf_base), "--training.steps=4", "--optimizer.lr=1e-12")
    finish(frozen)
    after = adapter_state(frozen)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-10


def test_unchanged_rates_leave_a_resumed_run_bit_for_bit(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), DETERMINISTIC]
    whole = train(tmp_path / "whole", *options, "--training.steps=6")
    train(tmp_path / "run", *options, "--training.steps=2")
    second = build(tmp_path / "run", *options, "--training.steps=6")
    finish(second)
    assert second.losses == whole.losses[2:] and second.lrs == whole.lrs[2:]
    expected, found = adapter_state(whole), adapter_state(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("left_out", ["lr_scheduler", "optimizer", "optimizer,lr_scheduler"])
def test_parts_that_are_left_out_of_loading_have_the_jobs_rates_too(
    left_out: str, hf_base: Path, tmp_path: Path
) -> None:
    train(tmp_path, *on(hf_base), "--training.steps=2", "--optimizer.lr=1e-3")
    out = [f"--checkpoint.exclude_from_loading={left_out}"]
    run = build(tmp_path, *on(hf_base), "--training.steps=4", "--optimizer.lr=1e-5", *out)
    run.trainer.checkpointer.load()
    scheduler = run.trainer.lr_schedulers.schedulers[0]
    epoch = 0 if "lr_scheduler" in left_out else 2
    assert scheduler.last_epoch == epoch
    rate = 1e-5 * scheduler.lr_lambdas[0](epoch)
    assert scheduler.get_last_lr() == [rate] == [run.trainer.optimizers.optimizers[0].param_groups[0]["lr"]]
    run.trainer.close()
