"""A run that stops, or does not go on: what its message says to do is done, and it goes on as it should. One rank."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, adapter_state, build, finish, full_state, train
from test_checkpoint import RANDOM_BASE, failing
from test_resume import EVERY_STEP, loaded, on, refused, rewritten, step
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

from lora_converter.peft import PeftAdapter, load_peft, save_peft

pytestmark = pytest.mark.slow

ONCE = "--checkpoint.interval=100"
ADAPTERS_ALONE = "--checkpoint.last_save_model_only"
PEFT = ["--checkpoint.last_save_in_hf", "--checkpoint.export_dtype=float32"]
LONGER = ["--training.steps=5", "--lr_scheduler.total_steps=5"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def goes_on(folder: Path, *options: str) -> Run:
    run = build(folder, *options)
    finish(run)
    assert all(map(math.isfinite, run.losses))
    return run


# Numbers


def test_a_run_that_diverged_goes_on_from_a_good_step_with_a_lower_rate(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step after the rate was raised is finite, and as bad as the ones after it."""
    options = [*on(hf_base), EVERY_STEP, "--lr_scheduler.total_steps=6"]
    train(tmp_path / "run", *options, "--training.steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    diverged = build(tmp_path / "run", *options, "--training.steps=5", "--optimizer.lr=1e30")
    finish(diverged)
    assert not math.isfinite(diverged.losses[-1]) and " hold nan or inf: " in caplog.text
    assert "step 5 is not saved: its adapters hold nan or inf. Older steps stay." in caplog.text
    assert step(tmp_path / "run", 3).exists()  # finite, so load_step has to say which step is good
    lower = [*options, "--training.steps=5", "--optimizer.lr=1e-4"]
    expected = goes_on(tmp_path / "good", *lower)
    found = goes_on(tmp_path / "run", *lower, "--checkpoint.load_step=2")
    assert found.losses == expected.losses and len(found.losses) == 3
    assert same(adapter_state(found), adapter_state(expected))
    assert loaded(tmp_path / "run", *lower).trainer.step == 5


def test_adapters_that_are_still_zero_move_with_a_rate_above_0(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, *on(hf_base), EVERY_STEP, "--optimizer.lr=0")
    assert "28 adapters are still zero, so they change nothing; is the learning rate above 0?" in caplog.text
    caplog.clear()
    run = goes_on(tmp_path, *on(hf_base), EVERY_STEP, "--optimizer.lr=3e-3", "--training.steps=6")
    assert len(run.losses) == 3 and "are still zero" not in caplog.text
    assert all(value.any() for value in adapter_state(run).values())


# Runs that are over


@pytest.mark.parametrize(
    ("last", "named"),
    [([], []), ([], ["--checkpoint.load_step=3"]), (PEFT, []), (PEFT, ["--checkpoint.load_step=3"])],
    ids=["DCP", "DCP that is named", "PEFT directory", "PEFT directory that is named"],
)
def test_a_finished_run_is_trained_on_from_its_adapters_in_another_folder(
    last: list[str], named: list[str], hf_base: Path, tmp_path: Path
) -> None:
    first = train(tmp_path / "run", *on(hf_base), ONCE, ADAPTERS_ALONE, *last)
    _, message = failing(tmp_path / "run", *on(hf_base), *LONGER, *named)
    assert "holds no optimizer state: it is the end of a finished run" in message
    if named:
        assert "name it as lora.initial_adapter_path in a new job.dump_folder" in message
    else:
        assert "name another job.dump_folder; to train on from adapters alone" in message
        assert message.endswith("name them as lora.initial_adapter_path there.")
    start = [*on(hf_base), f"--lora.initial_adapter_path={step(tmp_path / 'run', 3)}"]
    started = loaded(tmp_path / "next", *start, *LONGER)
    assert same(full_state(started), full_state(first))
    assert len(goes_on(tmp_path / "next", *start, *LONGER).losses) == 5


@pytest.mark.parametrize("last", [[], PEFT], ids=["DCP", "PEFT directory"])
def test_a_finished_run_is_resumed_at_an_earlier_step(last: list[str], hf_base: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *on(hf_base), *LONGER)
    train(tmp_path / "run", *on(hf_base), EVERY_STEP, "--lr_scheduler.total_steps=5", ADAPTERS_ALONE, *last)
    _, message = failing(tmp_path / "run", *on(hf_base), *LONGER, "--checkpoint.load_step=3")
    assert message.endswith("or resume an earlier step with checkpoint.load_step.")
    found = goes_on(tmp_path / "run", *on(hf_base), *LONGER, "--checkpoint.load_step=2")
    assert found.losses == whole.losses[2:] and same(adapter_state(found), adapter_state(whole))
    if last:
        assert load_peft(tmp_path / "run" / "checkpoint" / "set-aside-1" / "step-3").rank == 4


def test_a_run_whose_last_step_kept_all_is_extended_from_its_very_end(hf_base: Path, tmp_path: Path) -> None:
    """docs/checkpoints.md: set last_save_model_only to false."""
    whole = train(tmp_path / "whole", *on(hf_base), *LONGER)
    train(tmp_path / "run", *on(hf_base), ONCE, "--lr_scheduler.total_steps=5", "--checkpoint.no-last_save_model_only")
    assert goes_on(tmp_path / "run", *on(hf_base), *LONGER).losses == whole.losses[3:]


def test_adapters_of_a_random_base_are_trained_on_with_the_step_as_base_too(tmp_path: Path) -> None:
    """Without a base they would be put onto another random one."""
    first = train(tmp_path / "run", RANDOM_BASE, ONCE, ADAPTERS_ALONE)
    path = step(tmp_path / "run", 3)
    _, message = failing(tmp_path / "run", RANDOM_BASE, *LONGER, "--checkpoint.load_step=3")
    assert "To train on from its adapters, name it as lora.initial_adapter_path" in message
    start = [f"--lora.initial_adapter_path={path}", "--debug.seed=99"]
    _, message = failing(tmp_path / "next", RANDOM_BASE, *start)
    assert message.endswith(f"to the base it was trained on: {path} itself, which stores it.")
    base = f"--checkpoint.initial_load_path={path}"
    assert same(full_state(loaded(tmp_path / "next", base, *start)), full_state(first))
    assert len(goes_on(tmp_path / "next", base, *start).losses) == 3


@pytest.mark.parametrize("last", [[], PEFT], ids=["DCP", "PEFT directory"])
def test_an_adapter_is_started_from_on_the_base_that_is_set(last: list[str], hf_base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "run", *on(hf_base), ADAPTERS_ALONE, *last)
    start = f"--lora.initial_adapter_path={step(tmp_path / 'run', 3)}"
    _, message = failing(tmp_path / "next", RANDOM_BASE, start)
    assert "was not trained on this job's base, which is random." in message
    assert message.endswith("Set checkpoint.initial_load_path to the base it was trained on.")
    assert same(full_state(loaded(tmp_path / "next", *on(hf_base), start)), full_state(first))


# What is missing, or of another run


@pytest.mark.parametrize("lost", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("named", [False, True])
def test_a_step_goes_on_once_what_is_missing_is_put_back(lost: str, named: bool, hf_base: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *on(hf_base), *LONGER)
    train(tmp_path / "run", *on(hf_base), ONCE, "--lr_scheduler.total_steps=5")
    file, away = step(tmp_path / "run", 3) / lost, tmp_path / lost
    file.rename(away)
    options = [*on(hf_base), *LONGER, *(["--checkpoint.load_step=3"] if named else [])]
    if named or lost != ".metadata":
        _, message = failing(tmp_path / "run", *options)
        assert "is not complete: __0_0.distcp is missing" in message or "it has no .metadata file" in message
        assert named or "has steps, and none to continue from: " in message
        assert named or "Put back what is missing, or name another job.dump_folder" in message
        fresh = goes_on(tmp_path / "another", *on(hf_base), *LONGER)
        assert fresh.losses == whole.losses
    away.rename(file)
    assert goes_on(tmp_path / "run", *options).losses == whole.losses[3:]


def test_a_step_that_is_not_there_is_not_needed_for_the_newest(hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path, *on(hf_base))
    _, message = failing(tmp_path, *on(hf_base), "--checkpoint.load_step=7")
    assert message.endswith("Leave it at -1 for the newest step.")
    assert loaded(tmp_path, *on(hf_base), "--checkpoint.load_step=-1").trainer.step == 3


def test_a_step_of_other_settings_goes_on_with_its_own_or_anew_in_another_folder(hf_base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "run", *on(hf_base), "--lr_scheduler.total_steps=5")
    other = ["--lora.rank=8", "--lora.target_modules=wq"]
    _, message = failing(tmp_path / "run", *on(hf_base), *LONGER, *other)
    assert "was trained with other settings: lora.rank is 4 there and 8 here" in message
    assert message.endswith("Use its settings, or start anew.")
    assert len(goes_on(tmp_path / "new", *on(hf_base), *LONGER, *other).losses) == 5
    run = build(tmp_path / "run", *on(hf_base), *LONGER)
    run.trainer.checkpointer.load()
    assert run.trainer.step == 3 and same(adapter_state(run), adapter_state(first))
    run.trainer.close()


@pytest.mark.parametrize("way", ["resume", "import"])
def test_another_base_is_put_right_by_the_one_it_was_trained_on(way: str, hf_base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "run", *on(hf_base))
    other = rewritten(hf_base, tmp_path / "other", shift=0.01)
    folder, start = tmp_path / "run", []
    if way == "import":
        folder, start = tmp_path / "next", [f"--lora.initial_adapter_path={step(tmp_path / 'run', 3)}"]
    message = refused(folder, *on(other), *start)
    assert "was trained on a base with fingerprint" in message and "Name the base it was trained on, or set" in message
    assert same(full_state(loaded(folder, *on(hf_base), *start)), full_state(first))


def test_adapters_alone_are_resumed_on_the_base_that_is_set(dcp_base: Path, tmp_path: Path) -> None:
    base = f"--checkpoint.initial_load_path={dcp_base}"
    first = train(tmp_path, base)
    _, message = failing(tmp_path, RANDOM_BASE)
    assert message.endswith("holds adapters only. Set checkpoint.initial_load_path to the base they were trained on.")
    assert same(full_state(loaded(tmp_path, base)), full_state(first))


def test_a_step_that_stores_its_base_is_resumed_without_a_source_or_another_folder_is_used(
    dcp_base: Path, tmp_path: Path
) -> None:
    base = f"--checkpoint.initial_load_path={dcp_base}"
    first = train(tmp_path / "run", RANDOM_BASE)
    _, message = failing(tmp_path / "run", base)
    assert "stores a base of its own" in message
    assert message.endswith("Resume without a base source, or use another job.dump_folder.")
    assert same(full_state(loaded(tmp_path / "run", RANDOM_BASE)), full_state(first))
    assert len(goes_on(tmp_path / "another", base).losses) == 3


def test_a_last_step_that_does_not_fit_into_its_dtype_is_exported_by_another_launch(
    hf_base: Path, tmp_path: Path
) -> None:
    """checkpoint.export_dtype: nothing of the run is lost but the steps since the last that was saved."""
    factors = {"model.layers.0.self_attn.v_proj": (torch.full((4, 64), 2.0**20), torch.zeros(32, 4))}
    save_peft(PeftAdapter(factors, 4, 32.0, 0.0, False, ["v_proj"]), tmp_path / "large")
    start = [f"--lora.initial_adapter_path={tmp_path}/large", "--optimizer.lr=0"]
    job = [*on(hf_base), EVERY_STEP, ADAPTERS_ALONE, *PEFT, *start]
    run = build(tmp_path / "run", *job, "--checkpoint.export_dtype=float16")
    with pytest.raises(ValueError, match=r"would hold inf in torch\.float16\. Name a wider dtype, bfloat16 say\."):
        finish(run)
    run.trainer.close()
    assert not step(tmp_path / "run", 3).exists()
    again = goes_on(tmp_path / "run", *job, "--checkpoint.export_dtype=bfloat16")
    found = load_peft(step(tmp_path / "run", 3)).factors["model.layers.0.self_attn.v_proj"][0]
    assert len(again.losses) == 1 and torch.equal(found.float(), torch.full((4, 64), 2.0**20))


# The loss


def test_a_model_that_caps_its_logits_trains_with_the_loss_over_them(tmp_path: Path) -> None:
    spec = get_train_spec("llama3")

    class Capped(spec.model_cls):  # type: ignore[name-defined, misc]
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 3 * torch.tanh(super().forward(*args, **kwargs) / 3)

    register_train_spec("llama3_capped", dataclasses.replace(spec, model_cls=Capped))
    options = ["--model.name=llama3_capped", RANDOM_BASE]
    run = build(tmp_path / "refused", *options)
    with pytest.raises(
        ValueError, match=r"The model changes what its output head gives.* Set lora.loss_chunk_tokens = 0"
    ):
        run.trainer.train()
    run.trainer.close()
    assert len(goes_on(tmp_path / "capped", *options, "--lora.loss_chunk_tokens=0").losses) == 3
