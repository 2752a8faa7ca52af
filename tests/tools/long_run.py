"""Trains long, saves often, and watches the process from outside: memory, open files, threads.

    python tests/tools/long_run.py [--steps 2000] [--interval 50] [--flavor debugmodel] [--async-mode async] [--full]

One rank of the debug job with adapters, or with all weights to compare with; checkpoint.keep_latest_k = 2. What is held
may only move within the first fifth of the steps; the slope of the resident memory is that of a least-squares line over
the rest.
"""

import argparse
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

from forked_job import ForkedJob, make_base


@dataclass(frozen=True)
class Sample:
    """A process at a step."""

    step: int
    resident: int
    """Bytes."""
    files: int
    threads: int


def sample(pid: int, step: int) -> Sample:
    """What a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (int(re.search(rf"{field}:\s+(\d+)", status)[1]) for field in ("VmRSS", "Threads"))  # type: ignore[index]
    return Sample(step, resident * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), threads)


def watch(job: ForkedJob, steps: int, every: int) -> list[Sample]:
    """Runs a job to its end; a sample at about every n-th step."""
    job.launch()
    samples: list[Sample] = []
    while job.wait(lambda text: "Training completed" in text or job.trained_to() >= len(samples) * every + every):
        if "Training completed" in job.text():
            break
        samples.append(sample(job.pid, job.trained_to()))
        time.sleep(0.01)
    job.end()
    return samples


def long_run(
    folder: Path, *, steps: int, interval: int, flavor: str, async_mode: str = "disabled", full: bool = False
) -> list[Sample]:
    """The job in `folder / "run"`, on a random base of its own; samples of the settled part."""
    model = f"--model.flavor={flavor}"
    base = make_base(folder / "base", model, "--training.local_batch_size=2")
    settings = [
        *(model, "--training.local_batch_size=2", f"--training.steps={steps}"),
        *(f"--checkpoint.interval={interval}", "--checkpoint.keep_latest_k=2"),
        *(f"--checkpoint.async_mode={async_mode}", f"--metrics.log_freq={max(1, steps // 200)}"),
        f"--checkpoint.initial_load_path={base}",
    ]
    adapters = [] if full else ["--lora.dropout=0.1"]
    config = "debug_base.toml" if full else "debug_lora.toml"
    job = ForkedJob(folder / "run", 1, config, [*settings, *adapters])
    return [s for s in watch(job, steps, max(1, steps // 200)) if s.step > steps / 5]


def slope(samples: list[Sample]) -> float:
    """Bytes of resident memory per step."""
    return linear_regression([s.step for s in samples], [s.resident for s in samples]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--interval", type=int, default=50, help="of the checkpoints")
    parser.add_argument("--flavor", default="debugmodel")
    parser.add_argument("--async-mode", default="disabled")
    parser.add_argument("--full", action="store_true", help="all weights, without adapters")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settled = long_run(folder, **vars(options))
        left = sorted(path.name for path in (folder / "run" / "checkpoint").iterdir())
    first, last = settled[0], settled[-1]
    print(f"{options.steps} steps, {options.steps // options.interval} checkpoints, {time.monotonic() - start:.0f} s")
    memory = [f"{s.resident / 2**20:.1f} MiB at step {s.step}" for s in (first, last)]
    print(f"resident memory   {', '.join(memory)}, {slope(settled) * 1000 / 2**10:+.1f} KiB per 1,000 steps")
    for name in ("files", "threads"):
        values = [getattr(s, name) for s in settled]
        print(f"{name:<18}{values[0]} then, {values[-1]} at the end, at most {max(values)} between")
    print(f"steps left        {', '.join(left)}")


if __name__ == "__main__":
    main()
