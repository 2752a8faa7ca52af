"""Kills a job, ends it by SIGTERM and sends it back to older steps, again and again: while it loads, trains, saves,
removes old steps and exports.

    python tests/tools/torture.py [--moves 10] [--seed 0] [--folder DIR]

For 1 and 2 ranks (FSDP2), saving synchronously and asynchronously: the job runs once to its end, and once with that
many SIGKILLs, SIGTERMs and rollbacks (checkpoint.load_step) at random moments, each followed by a launch. Every launch
must continue from the newest step of its own branch that was complete when the last one ended; SIGTERM must lose no
step; and the adapter at the end must be that of the uninterrupted run, bit for bit.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from forked_job import ForkedJob, make_base

OPTIONS = (
    *("--lora.rank=4", "--lora.dropout=0.1", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=2"),
    *("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"),
)


@dataclass
class Counts:
    """What happened to one job."""

    kills: int = 0
    signals: int = 0
    """SIGTERMs that met a run between its first step and its last."""
    rollbacks: int = 0
    resumes: int = 0
    """Launches that continued from a step; the others came before there was one."""
    cut: int = 0
    """Steps that a kill had cut short, which the next launch named and passed over."""
    repeated: int = 0
    """Steps that were trained once more, but for rollbacks."""
    lost: int = 0
    """Launches that did not continue from the newest complete step of their branch, and steps that SIGTERM lost."""


class Branch:
    """What a launch must continue from, by the folder alone."""

    def __init__(self, folder: Path):
        self._folder, self._start, self._left = folder, 0, dict[int, int]()

    @property
    def start(self) -> int:
        return self._start

    def go_back(self, start: int) -> None:
        """What is newer is abandoned: known by its inode, since the branch writes steps of the same numbers."""
        self._start, self._left = start, {n: inode for n, inode in self._inodes().items() if n > start}

    def newest(self) -> int:
        """The newest complete step of the branch; where its first save has not begun, its start."""
        inodes = self._inodes()
        waits = any(inodes.get(number) == inode for number, inode in self._left.items())
        return self._start if waits else newest_complete(self._folder)

    def choices(self) -> list[int]:
        """Steps to go back to."""
        found = complete(self._folder) - {self._start}
        return sorted(n for n in found if self._left.get(n) != self._inodes().get(n) or n <= self._start)

    def _inodes(self) -> dict[int, int]:
        found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("checkpoint/*")}
        return {int(match[1]): path.stat().st_ino for path, match in found.items() if match}


def torture(
    folder: Path, base: Path, ranks: int, async_mode: str, *, moves: int, rng: random.Random, steps: int = 160
) -> Counts:
    """One job without and with kills, signals and rollbacks, `moves` of each.

    Raises:
        RuntimeError: A launch failed, or the final adapters differ.
    """
    options = [*OPTIONS, f"--checkpoint.initial_load_path={base}", f"--checkpoint.async_mode={async_mode}"]
    options += [f"--training.steps={steps}", f"--training.local_batch_size={4 // ranks}"]
    whole, job = (ForkedJob(folder / name, ranks, "debug_lora.toml", options) for name in ("whole", "moved"))
    whole.run()
    counts, trained, branch, started = Counts(), 0, Branch(job.folder), True
    while True:
        goes_back = started and counts.rollbacks < moves and rng.random() < 0.8 and branch.choices()
        if goes_back:
            branch.go_back(rng.choice(goes_back))
            counts.rollbacks += 1
            trained = branch.start
        repeats = branch.start and (not started or rng.random() < 0.5)  # a requeue has the same command
        newest = branch.newest()
        cut = incomplete(job.folder, newest)
        job.launch(*([f"--checkpoint.load_step={branch.start}"] if goes_back or repeats else []))
        ends = [kind for kind, done in (("kill", counts.kills), ("signal", counts.signals)) if done < moves]
        end = rng.choice(ends) if ends else ""
        last = f"step: {steps}" if len(ends) == 1 and counts.kills + counts.signals == 2 * moves - 1 else None
        if end and job.wait(moment(rng, last if end == "kill" else None)):
            time.sleep(rng.uniform(0, 0.05))
            if end == "kill":
                job.kill()
                counts.kills += 1
            else:
                job.signal(signal.SIGTERM)
                codes = job.exit_codes()
                if codes == [128 + signal.SIGTERM] * ranks:
                    counts.signals += 1
                    counts.lost += newest_complete(job.folder) != job.trained_to()
                elif any(code not in (0, -signal.SIGTERM) for code in codes):
                    raise RuntimeError(f"SIGTERM ended the ranks with {codes}:\n{job.text()[-3000:]}")
        else:
            job.end()
        text = job.text()
        resumed = re.search(r"LoRA: (?:resuming|starting) from .*step-(\d+)\.", text)
        started = "Training starts at step" in text
        if resumed or started:
            start = int(resumed[1]) if resumed else 0
            counts.resumes += bool(resumed)
            counts.lost += start != newest
            if not (goes_back or branch.start == newest):  # else it is loaded by its number
                counts.cut += len(cut)
                counts.lost += sum(f"step-{number}" not in text.partition("resuming from")[0] for number in cut)
            counts.repeated += max(0, min(trained, job.trained_to()) - start)
        trained = max(trained, job.trained_to())
        if not job.failed:
            break
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        final = [(run.folder / "checkpoint" / f"step-{steps}" / name).read_bytes() for run in (whole, job)]
        if final[0] != final[1]:
            raise RuntimeError(f"{name} at the end is not the uninterrupted run's.")
    return counts


def moment(rng: random.Random, last: str | None) -> Callable[[str], bool]:
    """When to kill, as a question to the log: after a line if one is given, else in the launch or some saves later."""
    if last is not None:
        return lambda text: last in text
    if rng.random() < 0.2:
        line = rng.choice(["Starting job", "Building", "LoRA: loading the base", "Training starts"])
        return lambda text: line in text
    saves = rng.randint(1, 4)
    line = rng.choice(["Saving the checkpoint", "Finished saving", "Checkpointer is deleting"])
    return lambda text: text.count(line) >= saves


def complete(folder: Path) -> set[int]:
    """By the formats' own rules: DCP writes `.metadata` last, a PEFT directory appears by its name."""
    marks = (".metadata", "adapter_config.json")
    found = [path.parent.name for mark in marks for path in folder.glob(f"checkpoint/step-*/{mark}")]
    return {int(match[1]) for name in found if (match := re.fullmatch(r"step-(\d+)", name))}


def newest_complete(folder: Path) -> int:
    return max(complete(folder), default=0)


def incomplete(folder: Path, newest: int) -> list[int]:
    """Steps after the newest complete one."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("checkpoint/*")]
    return [int(match[1]) for match in found if match and int(match[1]) > newest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--moves", type=int, default=10, help="kills, signals and rollbacks, each, of each of the four jobs"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if left out")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        base = make_base(folder / "base")
        names = [field.name for field in fields(Counts)]
        print(f"{'ranks':>6}{'saving':>10}", *(f"{name:>10}" for name in names), f"{'seconds':>10}", sep="")
        lost = 0
        for ranks in (1, 2):
            for mode in ("disabled", "async"):
                start = time.monotonic()
                counts = torture(folder / f"{ranks}-{mode}", base, ranks, mode, moves=options.moves, rng=rng)
                row = [*astuple(counts), round(time.monotonic() - start)]
                print(f"{ranks:>6}{mode:>10}", *(f"{value:>10}" for value in row), sep="", flush=True)
                lost += counts.lost
    print("The adapters at the end are those of the uninterrupted runs, bit for bit.")
    sys.exit(f"{lost} launches lost data." if lost else 0)


if __name__ == "__main__":
    main()
