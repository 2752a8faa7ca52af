"""Which step a run continues from, and which ones it removes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_peft_directory import an_adapter

from lora_converter.peft import load_peft, save_peft
from lora_converter.run.steps import discard, newest_step, stale_steps


def whole(folder: Path, *numbers: int) -> None:
    for number in numbers:
        state = {"a.lora_a.weight": torch.ones(2), "train_state.step": number}
        dcp.save(state, checkpoint_id=folder / f"step-{number}", no_dist=True)


def adapters_only(folder: Path, number: int) -> None:
    dcp.save({"a.lora_a.weight": torch.ones(2)}, checkpoint_id=folder / f"step-{number}", no_dist=True)


def cut_short(folder: Path, number: int) -> None:
    whole(folder, number)
    (folder / f"step-{number}" / ".metadata").unlink()


def newest(folder: Path, *, last: int = 100, needs_state: bool = True) -> tuple[int, list[str]]:
    step, skipped = newest_step(str(folder), last=last, needs_state=needs_state)
    return step.number if step else -1, [text.replace(f"{folder}/", "") for text in skipped]


def test_a_folder_that_is_not_there_or_holds_other_things_has_no_step(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (-1, [])
    whole(tmp_path, 3)
    for name in ("step-3.incomplete", "old-step-4", "step-x", "merged-5"):
        (tmp_path / "step-3").rename(tmp_path / name)
        assert newest(tmp_path) == (-1, [])
        (tmp_path / name).rename(tmp_path / "step-3")
    assert newest(tmp_path) == (3, [])


def test_the_newest_whole_step_is_taken_and_the_newer_ones_are_named_with_the_reason(tmp_path: Path) -> None:
    whole(tmp_path, 9, 10, 20, 30)
    cut_short(tmp_path, 40)
    (tmp_path / "step-30" / "__0_0.distcp").unlink()
    os.truncate(tmp_path / "step-20" / "__0_0.distcp", 100)
    number, skipped = newest(tmp_path)
    assert number == 10 and len(skipped) == 3
    assert skipped[0] == "step-40 is not a complete DCP checkpoint, it has no .metadata file"
    assert skipped[1] == "step-30 is not complete: __0_0.distcp is missing"
    assert skipped[2].startswith("step-20 is not complete: __0_0.distcp is cut short")


END = "holds no optimizer state: it is the end of a finished run (checkpoint.last_save_model_only)"


def test_adapters_alone_end_a_run_and_do_not_continue_one(tmp_path: Path) -> None:
    whole(tmp_path, 10)
    adapters_only(tmp_path, 20)
    save_peft(an_adapter(), tmp_path / "step-30")
    assert newest(tmp_path, last=30) == (30, [])
    assert newest(tmp_path, last=40) == (10, [f"step-30 {END}", f"step-20 {END}"])
    assert newest(tmp_path, last=40, needs_state=False) == (20, [f"step-30 {END}"])
    discard(tmp_path / "step-30")
    assert load_peft(tmp_path / "step-30.exported").rank == 3
    save_peft(an_adapter(rank=2), tmp_path / "step-30")
    discard(tmp_path / "step-30")
    assert [load_peft(tmp_path / f"step-30.exported{n}").rank for n in ("", "-1")] == [3, 2]
    assert newest(tmp_path, last=20) == (20, [])


def test_steps_that_were_whole_once_are_not_trained_over(tmp_path: Path) -> None:
    """An archive that is offline, say: a run from step 1 on would come to write where they are."""
    adapters_only(tmp_path, 20)
    whole(tmp_path, 30)
    (tmp_path / "step-30" / "__0_0.distcp").unlink()
    cut_short(tmp_path, 40)
    with pytest.raises(ValueError) as error:
        newest(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path} has steps, and none to continue from: {tmp_path}/step-40 is not a complete")
    assert "step-30 is not complete: __0_0.distcp is missing; " in message and f"step-20 {END}. Put back" in message
    for number in (20, 30):
        discard(tmp_path / f"step-{number}")
    assert newest(tmp_path)[0] == -1  # what is left never was


def test_a_damaged_description_is_a_damaged_step(tmp_path: Path) -> None:
    whole(tmp_path, 10, 20)
    (tmp_path / "step-20" / "lora.json").write_text("")
    number, (reason,) = newest(tmp_path)
    assert number == 10 and reason.startswith("step-20/lora.json cannot be read as JSON")


def test_a_file_in_place_of_a_step_is_passed_over(tmp_path: Path) -> None:
    whole(tmp_path, 10)
    (tmp_path / "step-20").write_text("")
    assert newest(tmp_path)[0] == 10


def test_a_seed_checkpoint_is_a_start_unless_it_is_an_export(tmp_path: Path) -> None:
    adapters_only(tmp_path, 0)
    cut_short(tmp_path, 10)
    assert newest(tmp_path)[0] == 0
    discard(tmp_path / "step-0")
    save_peft(an_adapter(), tmp_path / "step-0")
    assert newest(tmp_path)[0] == -1


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def test_only_whole_steps_count_as_kept(tmp_path: Path) -> None:
    """A killed save at 40, and one under way at 45: torchtitan would keep these two and remove the only whole ones."""
    whole(tmp_path, 10, 20, 30)
    cut_short(tmp_path, 40)
    cut_short(tmp_path, 45)
    assert names(stale_steps(str(tmp_path), keep=2, current=45)) == ["step-10", "step-20"]
    whole(tmp_path, 45)
    whole(tmp_path, 50)
    assert names(stale_steps(str(tmp_path), keep=2, current=50)) == ["step-10", "step-20", "step-30", "step-40"]


def test_what_cannot_be_continued_from_does_not_count_as_kept(tmp_path: Path) -> None:
    """The end of a run that was made longer, and a step whose data have gone."""
    whole(tmp_path, 10, 20, 30, 40)
    adapters_only(tmp_path, 50)
    (tmp_path / "step-40" / "__0_0.distcp").unlink()
    cut_short(tmp_path, 60)
    assert names(stale_steps(str(tmp_path), keep=2, current=60)) == ["step-10", "step-20"]


def test_a_link_to_an_archive_is_removed_and_not_the_archive(tmp_path: Path) -> None:
    whole(tmp_path / "archive", 10)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-10").symlink_to(tmp_path / "archive" / "step-10")
    discard(tmp_path / "run" / "step-10", wholly=False)
    assert newest(tmp_path / "archive")[0] == 10 and os.listdir(tmp_path / "run") == []


def test_results_and_steps_of_a_later_past_stay(tmp_path: Path) -> None:
    """checkpoint.load_step = 10 was given: 20 to 40 are newer than what is saved now."""
    save_peft(an_adapter(), tmp_path / "step-5")
    whole(tmp_path, 10, 12, 14, 20, 30, 40)
    assert names(stale_steps(str(tmp_path), keep=2, current=14)) == ["step-10"]


def test_a_step_that_is_half_removed_does_not_look_whole(tmp_path: Path) -> None:
    whole(tmp_path, 10)
    discard(tmp_path / "step-10", wholly=False)
    assert (tmp_path / "step-10" / "__0_0.distcp").exists() and newest(tmp_path)[0] == -1
    discard(tmp_path / "step-10")
    assert os.listdir(tmp_path) == []
