"""A resumed run on other data than its step was trained on: they are named, and start at their beginning. One rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import ROOT, Run, build, finish, train

STEPS = ("--checkpoint.interval=2", "--checkpoint.no-last_save_model_only", "--lr_scheduler.total_steps=9")


@pytest.fixture(scope="module")
def options(dcp_base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={dcp_base}", *STEPS]


@pytest.fixture(scope="module")
def reached_3(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reached_3")
    train(folder, *options, "--training.steps=3")
    return folder


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same lines in another order."""
    folder = shutil.copytree(ROOT / "tests/assets/c4_test", tmp_path_factory.mktemp("data") / "other")
    for path in folder.glob("*.json*"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    return folder


def resumed(reached: Path, folder: Path, *options: str) -> Run:
    run = build(shutil.copytree(reached, folder), *options, "--training.steps=5")
    finish(run)
    assert run.trainer.step == 5 and len(run.losses) == 2
    return run


def same_batches(run: Run, other: Run) -> bool:
    pairs = zip(run.batches, other.batches, strict=True)
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("change", ["text", "dataset", "seq_len", "local_batch_size", "seed"])
def test_other_data_start_at_their_beginning_and_what_differs_is_said(
    change: str, options: list[str], reached_3: Path, other_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (ROOT / "tests/assets/c4_test").resolve()
    changes = {
        "text": (f"--training.dataset_path={other_text}", f"training.dataset_path was '{text}' and is '{other_text}'"),
        "dataset": ("--training.dataset=C4_TEST", "training.dataset was 'c4_test' and is 'C4_TEST'"),
        "seq_len": ("--training.seq_len=48", "training.seq_len was 64 and is 48"),
        "local_batch_size": ("--training.local_batch_size=2", "training.local_batch_size was 4 and is 2"),
        "seed": ("--debug.seed=12", "debug.seed was 11 and is 12"),
    }
    option, told = changes[change]
    run = resumed(reached_3, tmp_path / "run", *options, option)
    step = tmp_path / "run" / "checkpoint" / "step-3"
    assert f"LoRA: other data than in {step}: {told}. They start at their beginning." in caplog.text
    fresh = train(tmp_path / "fresh", *options, option, "--training.steps=2")
    assert same_batches(run, fresh) and run.losses != fresh.losses  # adapters and optimizer are the step's


def test_the_same_data_go_on_where_they_were_also_under_another_name(
    options: list[str], reached_3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = tmp_path / "link"
    link.symlink_to(ROOT / "tests/assets/c4_test")
    whole = train(tmp_path / "whole", *options, "--training.steps=5")
    same = resumed(reached_3, tmp_path / "same", *options, f"--training.dataset_path={link}")
    assert "other data" not in caplog.text and same.losses == whole.losses[3:]


def test_a_step_that_does_not_know_its_data_goes_on(options: list[str], reached_3: Path, tmp_path: Path) -> None:
    """Steps of older versions."""
    folder = shutil.copytree(reached_3, tmp_path / "old")
    path = folder / "checkpoint" / "step-3" / "lora.json"
    description = json.loads(path.read_text())
    assert set(description.pop("data")) >= {"training.dataset", "training.dataset_path", "training.seq_len"}
    path.write_text(json.dumps(description))
    whole = train(tmp_path / "whole", *options, "--training.steps=5")
    assert resumed(folder, tmp_path / "run", *options).losses == whole.losses[3:]


def test_other_data_are_no_news_where_their_place_is_not_loaded(
    options: list[str], reached_3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    not_loaded = ["--checkpoint.exclude_from_loading=dataloader", "--training.seq_len=48"]
    resumed(reached_3, tmp_path / "run", *options, *not_loaded)
    assert "other data" not in caplog.text
