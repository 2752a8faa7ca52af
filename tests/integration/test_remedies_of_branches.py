"""A folder that another run holds, or that was gone back in: what the message says is done, and the run goes on."""

from pathlib import Path

import pytest
from harness import build, finish, train
from test_checkpoint import failing
from test_remedies_of_runs import LONGER, goes_on
from test_resume import EVERY_STEP, loaded, on

pytestmark = pytest.mark.slow

JOB = [EVERY_STEP, *LONGER]


@pytest.mark.parametrize("way", ["ended", "another folder", "deleted"])
def test_a_folder_that_is_held_is_free_once_its_run_is_ended_or_its_claim_deleted(
    way: str, hf_base: Path, tmp_path: Path
) -> None:
    expected = train(tmp_path / "expected", *on(hf_base), *JOB)
    first = build(tmp_path / "run", *on(hf_base), *JOB)
    first.trainer.checkpointer.load()
    _, message = failing(tmp_path / "run", *on(hf_base), *JOB)
    claim = tmp_path / "run" / "checkpoint.writer.json"
    assert " is written to by another run: " in message
    assert "End that one first, or name another job.dump_folder. If it is not running any more, delete " in message
    assert message.endswith(f"delete {claim}.")
    if way == "ended":
        first.trainer.close()
    elif way == "deleted":
        claim.unlink()
    folder = tmp_path / ("another" if way == "another folder" else "run")
    assert goes_on(folder, *on(hf_base), *JOB).losses == expected.losses
    if way == "deleted":  # who has lost his claim writes no more
        with pytest.raises(ValueError, match=r"This run writes to it no more: end it\."):
            finish(first)
    if way != "ended":
        first.trainer.close()
    assert loaded(folder, *on(hf_base), *JOB).trainer.step == 5


def test_a_damaged_claim_is_deleted(hf_base: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.writer.json").write_text("{")
    _, message = failing(tmp_path, *on(hf_base))
    assert message.endswith("Delete it if no run writes to its folder.")
    (tmp_path / "checkpoint.writer.json").unlink()
    assert len(goes_on(tmp_path, *on(hf_base)).losses) == 3


def test_a_branch_is_begun_once_more_or_left_when_its_record_is_deleted(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = train(tmp_path, *on(hf_base), *JOB)
    back = [*on(hf_base), *JOB, "--checkpoint.load_step=3"]
    record = tmp_path / "checkpoint" / "branch.json"
    assert goes_on(tmp_path, *back).losses == whole.losses[3:]
    assert loaded(tmp_path, *back).trainer.step == 5 and f"To go back once more, delete {record}." in caplog.text
    record.unlink()
    assert goes_on(tmp_path, *back).losses == whole.losses[3:]
    record.write_text("{")
    _, message = failing(tmp_path, *on(hf_base), *JOB)
    assert message.endswith("Delete it to go on from the newest step.")
    record.unlink()
    assert loaded(tmp_path, *on(hf_base), *JOB).trainer.step == 5
    record.write_text('{"start": 9, "aside": "set-aside-9"}')
    _, message = failing(tmp_path, *on(hf_base), *JOB)
    assert message.endswith(f"Delete {record} for the newest step.")
    record.unlink()
    assert loaded(tmp_path, *on(hf_base), *JOB).trainer.step == 5
