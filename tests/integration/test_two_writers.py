"""Two jobs on one dump folder: the second is refused, and trains once it does what it is told. One rank each."""

from pathlib import Path

import pytest
from forked_job import ForkedJob, make_base

pytestmark = pytest.mark.slow


def test_a_second_job_is_refused_until_the_first_has_ended_or_it_has_a_folder_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    options = [
        "--lora.rank=4",
        f"--checkpoint.initial_load_path={base}",
        "--training.local_batch_size=4",
        "--checkpoint.interval=100000",
    ]
    first = ForkedJob(tmp_path / "run", 1, "debug_lora.toml", [*options, "--training.steps=100000"])
    first.launch()
    assert first.wait(lambda text: "step:  5 " in text)
    second = ForkedJob(tmp_path / "run", 1, "debug_lora.toml", [*options, "--training.steps=3"])
    second._launches = 10  # logs of its own
    with pytest.raises(RuntimeError, match=rf"is written to by another run: process {first.pid} on .*, since "):
        second.run()
    told = "End that one first, or name another job.dump_folder. If it is not running any more, delete"
    assert told in second.text()

    third = ForkedJob(tmp_path / "other", 1, "debug_lora.toml", [*options, "--training.steps=3"])
    third.run()
    first.kill()
    second.run()  # at once: the dead one is seen to be dead
    assert f"was held by process {first.pid} on " in second.text() and second.trained_to() == third.trained_to() == 3
