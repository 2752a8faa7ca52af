"""`checkpoint.load_step` goes back to an older step: the run goes on with that branch, and loses nothing. One rank."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import Run, adapter_state, build, finish, full_state, train
from torch.distributed.checkpoint import FileSystemReader

EVERY_SECOND = ("--checkpoint.interval=2", "--checkpoint.no-last_save_model_only", "--lr_scheduler.total_steps=20")
BACK = ("--checkpoint.load_step=2", "--optimizer.lr=3e-4")
"""Another rate, so that a step of one branch cannot be taken for the other's."""


@pytest.fixture(scope="module")
def options(dcp_base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={dcp_base}", *EVERY_SECOND]


@pytest.fixture(scope="module")
def reached_8(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reached_8")
    train(folder, *options, "--training.steps=8")
    return folder


@pytest.fixture
def folder(reached_8: Path, tmp_path: Path) -> Path:
    """Of a run that has reached step 8."""
    return shutil.copytree(reached_8, tmp_path / "run")


def names(folder: Path) -> set[str]:
    checkpoint = folder / "checkpoint"
    found = [checkpoint, *checkpoint.glob("set-aside-*")]
    return {f"{path.relative_to(checkpoint)}" for parent in found for path in parent.iterdir() if path.is_dir()}


def started_at(run: Run) -> int:
    """Trains to the end: the number of steps that were there."""
    finish(run)
    return run.trainer.step - len(run.losses)


def test_a_branch_goes_on_from_its_own_newest_step_with_load_step_and_without(
    options: list[str], folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    before = stored(folder / "checkpoint" / "step-8")
    caplog.set_level("INFO")
    assert started_at(build(folder, *options, *BACK, "--training.steps=5")) == 2
    aside = folder / "checkpoint" / "set-aside-1"
    assert "going back to step 2 (checkpoint.load_step). step-4, step-6, step-8 will be moved to" in caplog.text
    assert f"moved step-4, step-6, step-8 to {aside}" in caplog.text
    assert names(folder) == {"step-2", "step-4", "step-5", "set-aside-1"} | {f"set-aside-1/step-{n}" for n in (4, 6, 8)}
    after = stored(aside / "step-8")
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert started_at(build(folder, *options, *BACK, "--training.steps=7")) == 5
    assert "An earlier launch went back there, and this one continues it." in caplog.text
    assert f"To go back once more, delete {folder}/checkpoint/branch.json." in caplog.text
    assert started_at(build(folder, *options, BACK[1], "--training.steps=9")) == 7
    whole = tmp_path_factory.mktemp("whole")
    train(whole, *options, "--training.steps=2")
    expected = train(whole, *options, BACK[1], "--training.steps=9")
    found = build(folder, *options, BACK[1], "--training.steps=9")
    finish(found)
    pairs = [(value, full_state(found)[name]) for name, value in full_state(expected).items()]
    assert pairs and all(torch.equal(*pair) for pair in pairs)


def stored(step: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(step)
    files = [*step.glob("*.distcp")]
    assert reader.read_metadata().state_dict_metadata and files
    return {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files}


def test_going_back_once_more_after_the_record_is_deleted(options: list[str], folder: Path) -> None:
    assert started_at(build(folder, *options, *BACK, "--training.steps=4")) == 2
    (folder / "checkpoint" / "branch.json").unlink()
    assert started_at(build(folder, *options, *BACK, "--training.steps=4")) == 2
    assert {"set-aside-1/step-8", "set-aside-2/step-4", "step-4"} <= names(folder)


def test_another_step_begins_another_branch(options: list[str], folder: Path) -> None:
    assert started_at(build(folder, *options, *BACK, "--training.steps=6")) == 2
    assert started_at(build(folder, *options, "--checkpoint.load_step=4", "--training.steps=8")) == 4
    assert names(folder) >= {"set-aside-1/step-6", "set-aside-1/step-8", "set-aside-2/step-6", "step-4", "step-8"}
    assert started_at(build(folder, *options, "--checkpoint.load_step=4", "--training.steps=9")) == 8


def test_a_requeued_job_goes_on_where_its_load_step_was_the_newest(options: list[str], folder: Path) -> None:
    """The command of a requeue is the same, load_step included, although nothing newer was there at first."""
    newest = "--checkpoint.load_step=8"
    assert started_at(build(folder, *options, newest, "--training.steps=10")) == 8
    assert started_at(build(folder, *options, newest, "--training.steps=12")) == 10
    assert not [name for name in names(folder) if "set-aside" in name]


class Killed(BaseException):
    """As by SIGKILL: nothing is cleaned up after it."""


KILLED_AT = {
    "before its first save": ("lora_converter.run.branch.Branch.settle", Killed),
    "after one step was moved": ("lora_converter.run.branch.os.rename", None),
    "after all were moved": ("lora_converter.run.branch.write_whole", Killed),
    "after that was written down": ("lora_converter.run.run.discard", Killed),
    "while it writes its first step": ("torchtitan.components.checkpoint.dcp.save", Killed),
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_run_killed_before_its_branch_has_a_step_begins_there_again(
    moment: str, options: list[str], folder: Path
) -> None:
    target, effect = KILLED_AT[moment]
    moved = iter(["one"])

    def move_one(source: Path, target: Path) -> None:
        if next(moved, None) is None:
            raise Killed
        os.replace(source, target)

    run = build(folder, *options, *BACK, "--training.steps=5")
    run.trainer.checkpointer.load(2)
    with mock.patch(target, side_effect=effect or move_one), pytest.raises(Killed):
        run.trainer.train()
    run.trainer.close()
    without = shutil.copytree(folder, folder.with_name("without"))
    assert started_at(build(without, *options, *BACK[1:], "--training.steps=3")) == 2
    assert started_at(build(folder, *options, *BACK, "--training.steps=5")) == 2
    assert names(folder) == {"step-2", "step-4", "step-5", "set-aside-1"} | {f"set-aside-1/step-{n}" for n in (4, 6, 8)}


def test_what_is_exported_at_the_end_belongs_to_the_branch(hf_base: Path, tmp_path: Path) -> None:
    """The last step is a PEFT directory, and a merged model stands beside it: both are of the branch they came from."""
    options = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf", "--lora.save_merged"]
    options += ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--checkpoint.interval=2"]
    train(tmp_path, *options)  # 3 steps
    first = (tmp_path / "checkpoint" / "merged-3" / "model.safetensors").read_bytes()
    run = train(tmp_path, *options, *BACK)
    assert len(run.losses) == 1
    assert (tmp_path / "checkpoint" / "set-aside-1" / "merged-3" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "checkpoint" / "merged-3" / "model.safetensors").read_bytes() != first
    assert {"set-aside-1/step-3", "step-3"} <= names(tmp_path)


def test_a_run_that_only_reads_begins_no_branch(options: list[str], folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoint").iterdir()}
    build_and_load = build(folder, *options, "--checkpoint.load_step=2", "--checkpoint.load_only")
    build_and_load.trainer.checkpointer.load(2)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoint").iterdir()} == before
    build_and_load.trainer.close()


def test_a_refused_launch_begins_no_branch(options: list[str], folder: Path) -> None:
    run = build(folder, *options, "--checkpoint.load_step=2", "--lora.alpha=8")
    with pytest.raises(ValueError, match="was trained with other settings"):
        run.trainer.checkpointer.load(2)
    run.trainer.close()
    assert not (folder / "checkpoint" / "branch.json").exists()


@pytest.mark.parametrize("text", ["{", "{}", '{"start": "2"}', '{"start": 2, "aside": "../elsewhere"}'])
def test_a_damaged_record_is_refused_and_can_be_deleted(text: str, options: list[str], folder: Path) -> None:
    path = folder / "checkpoint" / "branch.json"
    path.write_text(text)
    run = build(folder, *options, "--training.steps=9")
    with pytest.raises(ValueError, match=r"branch\.json is damaged .*Delete it to go on from the newest step"):
        run.trainer.checkpointer.load()
    run.trainer.close()
    path.unlink()
    assert started_at(build(folder, *options, "--training.steps=9")) == 8


def test_a_branch_whose_beginning_is_gone_says_what_to_delete(options: list[str], folder: Path) -> None:
    path = folder / "checkpoint" / "branch.json"
    path.write_text(json.dumps({"start": 3, "aside": "set-aside-1"}))
    run = build(folder, *options, "--training.steps=9")
    with pytest.raises(ValueError, match=rf"there is no .*step-3\. Delete {path} for the newest step"):
        run.trainer.checkpointer.load()
    path.unlink()
    assert started_at(run) == 8
    assert adapter_state(run)
