"""A run that is launched once more: on its own base, with its own settings, from the newest whole step. One rank."""

import json
import os
import shutil
import stat
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import TINY, Run, adapter_state, build, finish, full_state, train
from safetensors.torch import load_file, save_file
from test_checkpoint import failing
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

from lora_converter.fingerprint import base_fingerprint
from lora_converter.peft import load_peft
from lora_converter.run import run as lora_run

llama3_args["tiny_twin"] = TransformerModelArgs(**TINY)

EVERY_STEP = "--checkpoint.interval=1"


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def rewritten(base: Path, folder: Path, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Path:
    """The base with one weight moved, or in another dtype."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += shift
    stored = {name: value.to(dtype) for name, value in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoint" / f"step-{number}"


def loaded(folder: Path, *options: str) -> Run:
    run = build(folder, *options)
    run.trainer.checkpointer.load(run.trainer.job_config.checkpoint.load_step)
    run.trainer.close()
    return run


@pytest.mark.parametrize("way", ["resume", "import"])
def test_other_settings_are_refused_with_all_differences(way: str, hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *on(hf_base), "--training.steps=2")
    folder, start = tmp_path / "run", []
    if way == "import":
        folder, start = tmp_path / "next", [f"--lora.initial_adapter_path={step(tmp_path / 'run', 2)}"]
    other = ["--lora.rank=8", "--lora.alpha=8", "--lora.use_rslora", "--lora.target_modules=wq,w1"]
    _, message = failing(folder, *on(hf_base), *start, *other, "--model.flavor=tiny_twin")
    names = [f"layers.{layer}.{name}" for layer in range(4) for name in ("attention.wk", "attention.wo")]
    assert message.startswith(
        f"{step(tmp_path / 'run', 2)} was trained with other settings: model.flavor is 'tiny' there and 'tiny_twin' "
        "here; lora.rank is 4 there and 8 here; lora.alpha is 32.0 there and 8.0 here; lora.use_rslora is False there "
        "and True here; 20 modules are adapted only there: "
    )
    assert all(name in message for name in names)
    assert message.endswith(". Use its settings, or start anew.")
    loaded(folder, *on(hf_base), *start, "--lora.dropout=0.3")  # which may change


def test_a_step_that_does_not_tell_its_settings_is_warned_of(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, *on(hf_base), "--training.steps=2")
    (step(tmp_path, 2) / "lora.json").unlink()
    assert loaded(tmp_path, *on(hf_base)).trainer.step == 2
    assert f"{step(tmp_path, 2)} has no lora.json, so its settings and its base are not checked." in caplog.text
    (step(tmp_path, 2) / "lora.json").write_text('{"model": 1}')
    _, message = failing(tmp_path, *on(hf_base))
    assert f" has steps, and none to continue from: {step(tmp_path, 2)}/lora.json is damaged" in message


def refused(folder: Path, *options: str) -> str:
    """The base itself is loaded by then; adapters and step are as they were."""
    run = build(folder, *options)
    before = adapter_state(run)
    with pytest.raises(ValueError) as error:
        run.trainer.checkpointer.load()
    after = adapter_state(run)
    assert all(torch.equal(before[name], after[name]) for name in before) and run.trainer.step == 0
    run.trainer.close()
    return str(error.value)


@pytest.mark.parametrize("way", ["resume", "step folder", "PEFT directory"])
def test_another_base_is_refused_with_both_fingerprints_unless_accepted(
    way: str, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"] * (way == "PEFT directory")
    first = train(tmp_path / "run", *on(hf_base), "--training.steps=2", *export)
    folder, start = tmp_path / "run", []
    if way != "resume":
        folder, start = tmp_path / "next", [f"--lora.initial_adapter_path={step(tmp_path / 'run', 2)}"]
    other = rewritten(hf_base, tmp_path / "other", shift=0.01)
    there = base_fingerprint(first.trainer.model_parts[0])
    run = loaded(tmp_path / "alone", *on(other))
    here = base_fingerprint(run.trainer.model_parts[0])
    assert there != here
    message = f"{step(tmp_path / 'run', 2)} was trained on a base with fingerprint {there}; that of {other} is {here}."
    assert refused(folder, *on(other), *start) == (
        f"{message} Name the base it was trained on, or set lora.accept_other_base = true."
    )
    accepted = build(folder, *on(other), *start, "--lora.accept_other_base")
    finish(accepted)
    assert f"{message} lora.accept_other_base is set, so it is used all the same." in caplog.text
    assert json.loads((step(folder, 3) / "lora.json").read_text())["base_fingerprint"] == here


def test_the_base_may_move_and_be_stored_in_bf16(hf_base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "run", *on(hf_base), "--training.steps=2")
    second = build(tmp_path / "run", *on(rewritten(hf_base, tmp_path / "other", torch.bfloat16)))
    finish(second)
    assert len(first.losses) == 2 and len(second.losses) == 1


def test_steps_of_a_base_without_source_need_no_fingerprint(tmp_path: Path) -> None:
    run = train(tmp_path, "--checkpoint.initial_load_path=", "--training.steps=2")
    described = json.loads((step(tmp_path, 2) / "lora.json").read_text())
    assert described["base"] == described["base_fingerprint"] == "" and len(run.losses) == 2


@pytest.mark.parametrize("how", ["cut short", "file missing"])
def test_a_damaged_newest_step_is_passed_over_with_the_reason(
    how: str, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = ["--lr_scheduler.total_steps=4", EVERY_STEP]
    whole = train(tmp_path / "whole", *on(hf_base), *schedule, "--training.steps=4")
    train(tmp_path / "run", *on(hf_base), *schedule, "--training.steps=3")
    data = step(tmp_path / "run", 3) / "__0_0.distcp"
    if how == "cut short":
        os.truncate(data, 1000)
    else:
        data.unlink()
    again = build(tmp_path / "run", *on(hf_base), *schedule, "--training.steps=4")
    finish(again)
    assert f"LoRA: not resumed from: {step(tmp_path / 'run', 3)} is not complete: __0_0.distcp is " in caplog.text
    assert again.losses == whole.losses[2:]
    expected, found = full_state(whole), full_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_step_that_is_written_over_never_looks_whole_with_parts_of_two(hf_base: Path, tmp_path: Path) -> None:
    """checkpoint.load_step goes back; the job is killed while it writes a step that was there before."""
    train(tmp_path, *on(hf_base), EVERY_STEP)
    run = build(tmp_path, *on(hf_base), EVERY_STEP, "--checkpoint.load_step=1", "--training.steps=4")
    killed = mock.patch("torchtitan.components.checkpoint.dcp.save", side_effect=KeyboardInterrupt("killed"))
    with killed, pytest.raises(KeyboardInterrupt):
        finish(run)
    run.trainer.close()
    # What killed it had begun to write would be there beside lora.json; the older ones were set aside before.
    assert os.listdir(step(tmp_path, 2)) == ["lora.json"]


END = ["--checkpoint.last_save_model_only", EVERY_STEP]
PEFT = ["--checkpoint.last_save_in_hf", "--checkpoint.export_dtype=float32"]


@pytest.mark.parametrize("last", [[], PEFT], ids=["DCP", "PEFT directory"])
def test_a_run_that_is_over_has_nothing_left_to_train_and_a_longer_one_goes_on(
    last: list[str], hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(tmp_path, *on(hf_base), *END, *last)
    again = build(tmp_path, *on(hf_base), *END, *last, "--debug.seed=99")
    caplog.set_level("INFO")
    finish(again)
    assert "LoRA: the run ended at step 3; there is nothing left to train." in caplog.text
    assert again.losses == [] and again.trainer.step == 3
    expected, found = adapter_state(first), adapter_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if last:
        other = build(tmp_path, *on(hf_base), *END, *last, "--lora.alpha=8")
        with pytest.raises(ValueError, match=r"step-3 was trained with other settings: lora\.alpha is 32\.0 there and"):
            other.trainer.checkpointer.load()
        other.trainer.close()
    longer = build(tmp_path, *on(hf_base), *END, *last, "--training.steps=4")
    finish(longer)
    assert len(longer.losses) == 2  # steps 3 and 4: the last one held no optimizer state
    assert f"LoRA: not resumed from: {step(tmp_path, 3)} " in caplog.text and step(tmp_path, 3).exists()
    if last:  # a result is not lost where a step is written over it
        assert load_peft(tmp_path / "checkpoint" / "step-3.exported").rank == 4


def test_a_merge_that_was_killed_is_done_by_the_next_launch(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), *END, *PEFT, "--lora.save_merged"]
    killed = mock.patch.object(lora_run, "merge_directories", side_effect=KeyboardInterrupt("killed"))
    with killed, pytest.raises(KeyboardInterrupt):
        train(tmp_path, *options)
    assert not (tmp_path / "checkpoint" / "merged-3").exists()
    train(tmp_path, *options)
    assert (tmp_path / "checkpoint" / "merged-3" / "lora_merge.json").exists()
    with mock.patch.object(lora_run, "merge_directories", side_effect=AssertionError("again")):
        train(tmp_path, *options)


def test_a_dcp_step_gives_way_to_the_peft_directory_of_the_same_number(hf_base: Path, tmp_path: Path) -> None:
    """The run goes back, and ends where a step of its earlier past was."""
    train(tmp_path, *on(hf_base), EVERY_STEP)
    options = ["--checkpoint.load_step=2", "--checkpoint.last_save_model_only", *PEFT]
    train(tmp_path, *on(hf_base), EVERY_STEP, *options)
    assert sorted(os.listdir(step(tmp_path, 3))) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_is_not_finite_is_not_saved_and_the_next_launch_has_the_last_good_step(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in torchtitan the run goes on; here keep_latest_k cannot push the good steps out."""
    options = [*on(hf_base), EVERY_STEP, "--checkpoint.keep_latest_k=2", "--training.steps=6"]
    run = build(tmp_path, *options)
    train_step = run.trainer.train_step

    def poisoned(data):  # type: ignore[no-untyped-def]
        if run.trainer.step == 3:
            next(iter(run.trainer.optimizers.model_parts[0].parameters())).data.fill_(torch.nan)
        train_step(data)

    run.trainer.train_step = poisoned
    finish(run)
    assert len(run.losses) == 6 and caplog.text.count("hold nan or inf: layers.0.attention.wq, ") == 1
    assert caplog.text.count(" is not saved: its adapters hold nan or inf. Older steps stay.") == 4
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-1", "step-2"]
    assert loaded(tmp_path, *options).trainer.step == 2


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_what_a_run_writes_has_the_permissions_of_the_umask(umask: int, hf_base: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        train(tmp_path / "run", *on(hf_base), *END, *PEFT, "--lora.save_merged")
    finally:
        os.umask(before)
    written = list((tmp_path / "run" / "checkpoint").rglob("*"))
    assert len(written) > 10
    for path in written:
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == allowed, path
