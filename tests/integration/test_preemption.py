"""SIGTERM and SIGUSR1 to running jobs: the step that they are in is saved, and the next launch goes on from there."""

import re
import signal
import time
from pathlib import Path

import pytest
from forked_job import ForkedJob, make_base

pytestmark = pytest.mark.slow

STEPS = 40
OPTIONS = (
    *("--lora.rank=4", "--lora.dropout=0.1", f"--training.steps={STEPS}", "--checkpoint.interval=100"),
    *("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.global_batch_size=4"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The adapter at the end of a run that nobody has stopped, by its ranks."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for ranks in (1, 2):
        job = a_job(folder / f"{ranks}", base, ranks)
        job.run()
        found[ranks] = adapter(job)
    return found


def a_job(folder: Path, base: Path, ranks: int, *options: str) -> ForkedJob:
    sizes = [f"--training.local_batch_size={4 // ranks}", f"--checkpoint.initial_load_path={base}"]
    return ForkedJob(folder, ranks, "debug_lora.toml", [*OPTIONS, *sizes, *options])


def adapter(job: ForkedJob) -> bytes:
    return (job.folder / "checkpoint" / f"step-{STEPS}" / "adapter_model.safetensors").read_bytes()


def steps(job: ForkedJob) -> set[int]:
    found = [re.fullmatch(r"step-(\d+)", path.parent.name) for path in job.folder.glob("checkpoint/*/.metadata")]
    return {int(match[1]) for match in found if match}


@pytest.mark.parametrize(
    ("ranks", "number", "told", "mode"),
    [
        (1, signal.SIGTERM, None, "disabled"),
        (2, signal.SIGTERM, None, "async"),
        (2, signal.SIGUSR1, [1], "disabled"),
    ],
    ids=["one rank", "all of two, saving asynchronously", "one of two"],
)
def test_a_signal_ends_a_run_after_the_step_it_is_in_and_nothing_is_lost(
    ranks: int, number: int, told: list[int] | None, mode: str, base: Path, whole: dict[int, bytes], tmp_path: Path
) -> None:
    job = a_job(tmp_path, base, ranks, f"--checkpoint.async_mode={mode}")
    job.launch()
    assert job.wait(lambda text: "step: 10 " in text)
    job.signal(number, told)
    assert job.exit_codes() == [128 + number] * ranks
    text = job.text()
    said = re.search(rf"LoRA: {signal.Signals(number).name}: step (\d+) is finished and saved", text)
    assert said and steps(job) == {job.trained_to()} and job.trained_to() - int(said[1]) in (0, 1)
    assert f"the run ends after step {job.trained_to()}, with exit code {128 + number}." in text
    assert not (tmp_path / "checkpoint.writer.json").exists()
    stopped_at = job.trained_to()
    job.run()
    assert f"step-{stopped_at}." in job.text() and f"Training starts at step {stopped_at + 1}" in job.text()
    assert adapter(job) == whole[ranks]


def test_a_second_signal_ends_at_once_and_one_that_is_handed_on_is_no_second(base: Path, tmp_path: Path) -> None:
    """A step of 10,000 microbatches, which nobody waits for."""
    job = a_job(tmp_path, base, 1, "--training.global_batch_size=40000", "--training.local_batch_size=4")
    job.launch()
    assert job.wait(lambda text: "Training starts" in text)
    time.sleep(0.5)
    for _ in range(3):  # Slurm to all processes, torchrun to its ranks
        job.signal(signal.SIGTERM)
        time.sleep(0.05)
    assert job.wait(lambda text: "step 1 is finished and saved" in text)
    time.sleep(1.0)
    assert not job.failed
    start = time.monotonic()
    job.signal(signal.SIGTERM)
    assert job.exit_codes() == [143] and time.monotonic() - start < 10  # the step takes many minutes
    assert "SIGTERM: ends at once, without a save: a second signal." in job.text() and steps(job) == set()


def test_a_rank_that_is_gone_is_not_waited_for(base: Path, tmp_path: Path) -> None:
    """What an elastic agent does when a rank fails: it tells the others to end, which cannot finish their step."""
    job = a_job(tmp_path, base, 2, "--training.global_batch_size=40000", "--training.local_batch_size=2")
    job.launch()
    assert job.wait(lambda text: "Training starts" in text)
    time.sleep(0.5)
    job.signal(signal.SIGKILL, [1])
    start = time.monotonic()
    job.signal(signal.SIGTERM, [0])
    codes = job.exit_codes()
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL and time.monotonic() - start < 15


@pytest.mark.parametrize("option", ["--checkpoint.no-enable", "--checkpoint.load_only"])
def test_a_run_that_saves_nothing_is_ended_by_the_signal_itself(option: str, base: Path, tmp_path: Path) -> None:
    no_base = ["--checkpoint.no-last_save_in_hf", "--checkpoint.initial_load_path="] * ("no-enable" in option)
    job = a_job(tmp_path, base, 1, option, *no_base, "--training.steps=100000")
    job.launch()
    assert job.wait(lambda text: "step:  5 " in text)
    job.signal(signal.SIGTERM)
    assert job.exit_codes() == [-signal.SIGTERM] and steps(job) == set()


def test_a_signal_in_the_last_step_changes_nothing(base: Path, whole: dict[int, bytes], tmp_path: Path) -> None:
    job = a_job(tmp_path, base, 1)
    job.launch()
    assert job.wait(lambda text: f"step: {STEPS} " in text)
    job.signal(signal.SIGTERM)
    assert job.exit_codes() == [0] and adapter(job) == whole[1]


def test_phase_1_is_ended_and_continued_too(tmp_path: Path) -> None:
    options = ["--lora.rank=4", "--lora.full_phase.steps=200", "--training.steps=2", "--checkpoint.interval=100"]
    job = ForkedJob(tmp_path, 1, "debug_lora.toml", [*options, "--checkpoint.initial_load_path="])
    job.launch()
    assert job.wait(lambda text: "step: 10 " in text)
    job.signal(signal.SIGTERM)
    assert job.exit_codes() == [143]
    stopped_at = job.trained_to()
    assert (tmp_path / "checkpoint_full_phase" / f"step-{stopped_at}" / ".metadata").exists()
    assert not (tmp_path / "checkpoint").exists()  # nor a claim on it
    job.run()
    assert f"Training starts at step {stopped_at + 1}" in job.text() and "phase 2 of 2" in job.text()
