"""Kills a job with SIGKILL again and again: while it loads, trains, saves, removes old steps and exports.

    python tests/tools/torture.py [--kills 10] [--seed 0] [--folder DIR]

For 1 and 2 ranks (FSDP2), saving synchronously and asynchronously: the job runs once to its end, and once with kills
at random moments, each followed by a launch. Every launch must continue from the newest step that was complete when
the last one died, and the adapter at the end must be that of the uninterrupted run, bit for bit.
"""

import argparse
import random
import re
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
    resumes: int = 0
    """Launches that continued from a step; the others came before there was one."""
    cut: int = 0
    """Steps that a kill had cut short, which the next launch named and passed over."""
    repeated: int = 0
    """Steps that were trained once more."""
    lost: int = 0
    """Launches that did not continue from the newest complete step."""


def torture(
    folder: Path, base: Path, ranks: int, async_mode: str, *, kills: int, rng: random.Random, steps: int = 120
) -> Counts:
    """One job without and with kills.

    Raises:
        RuntimeError: A launch failed, or the final adapters differ.
    """
    options = [*OPTIONS, f"--checkpoint.initial_load_path={base}", f"--checkpoint.async_mode={async_mode}"]
    options += [f"--training.steps={steps}", f"--training.local_batch_size={4 // ranks}"]
    whole, job = (ForkedJob(folder / name, ranks, "debug_lora.toml", options) for name in ("whole", "killed"))
    whole.run()
    counts, trained = Counts(), 0
    while True:
        newest = newest_complete(job.folder)
        cut = incomplete(job.folder, newest)
        job.launch()
        last = f"step: {steps}" if counts.kills == kills - 1 else None  # which is followed by the export
        if counts.kills < kills and job.wait(moment(rng, last)):
            time.sleep(rng.uniform(0, 0.05))
            job.kill()
            counts.kills += 1
        else:
            job.end()
        text = job.text()
        resumed = re.search(r"LoRA: (?:resuming|starting) from .*step-(\d+)\.", text)
        if resumed or "Training starts at step" in text:
            start = int(resumed[1]) if resumed else 0
            counts.resumes += bool(resumed)
            counts.lost += start != newest
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


def newest_complete(folder: Path) -> int:
    """By the formats' own rules: DCP writes `.metadata` last, a PEFT directory appears by its name."""
    marks = (".metadata", "adapter_config.json")
    found = [path.parent.name for mark in marks for path in folder.glob(f"checkpoint/step-*/{mark}")]
    return max((int(match[1]) for name in found if (match := re.fullmatch(r"step-(\d+)", name))), default=0)


def incomplete(folder: Path, newest: int) -> list[int]:
    """Steps after the newest complete one."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("checkpoint/*")]
    return [int(match[1]) for match in found if match and int(match[1]) > newest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each of the four jobs")
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
                counts = torture(folder / f"{ranks}-{mode}", base, ranks, mode, kills=options.kills, rng=rng)
                row = [*astuple(counts), round(time.monotonic() - start)]
                print(f"{ranks:>6}{mode:>10}", *(f"{value:>10}" for value in row), sep="", flush=True)
                lost += counts.lost
    print("The adapters at the end are those of the uninterrupted runs, bit for bit.")
    sys.exit(f"{lost} launches lost data." if lost else 0)


if __name__ == "__main__":
    main()
