"""Two gloo ranks: one folder for all of them, one writer, and one step after which a signal ends them."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from harness import build, train
from launch import main
from tiny_models import base_options

from lora_converter.processes import Process
from lora_converter.run import claim
from lora_converter.run.claim import Holder
from lora_converter.run.preemption import Preemption


def agrees(folder: Path) -> None:
    """As where a host runs ahead of its device: nothing in a step waits for the other rank, and one is slow."""
    rank, preemption, step = dist.get_rank(), Preemption(), 0
    preemption.listen(0)
    while not preemption.ends_after(step := step + 1):
        if rank == 0 and step == 20:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.001 if rank == 0 else 0.02)
    preemption.close()
    ends: list[Any] = [None, None]
    dist.all_gather_object(ends, (step, preemption.exit_code))
    assert ends[0] == ends[1] and ends[0][1] == 128 + signal.SIGUSR1 and ends[0][0] > 20, ends


def listens_again(folder: Path) -> None:
    """The next run of the process starts without the last one's signal, and what was there before is put back."""
    preemption = Preemption()
    preemption.listen(0)
    time.sleep(0.6)  # it has looked at the store
    assert not any(preemption.ends_after(step) for step in range(1, 100))
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == signal.getsignal(signal.SIGUSR1)


def failing(folder: Path | str, *options: str) -> str:
    run = build(folder, *options)
    try:
        run.trainer.checkpointer.load()
    except ValueError as e:
        return str(e)
    finally:
        run.trainer.close()
    return ""


def is_shared(folder: Path) -> None:
    """A relative dump folder, and ranks that were started in different places."""
    rank, options, here = dist.get_rank(), base_options("llama3", folder.parent.parent), os.getcwd()
    steps = ["--training.steps=1", "--checkpoint.interval=1"]
    with tempfile.TemporaryDirectory() as own:
        os.chdir(own)
        with mock.patch.object(claim, "_VISIBLE_AFTER", 0.3):
            message = failing("run", *options, *steps)
        left = os.listdir(own)
        os.chdir(here)
    assert message.startswith("Rank 1 of 2: ") and "is not the folder that rank 0 writes to. " in message
    assert "put job.dump_folder on storage that all machines share" in message and left in ([], ["run"]), (rank, left)
    assert len(train(folder / "shared", *options, *steps).losses) == 1


def is_held(folder: Path) -> None:
    """By the launcher of these ranks, which lives."""
    options, path = base_options("llama3", folder.parent.parent), folder / "checkpoint.writer.json"
    parent = Process.of(os.getppid())
    since = "2026-01-01T00:00:00+00:00"
    holder = Holder("elsewhere", parent.number, since, parent.place, parent.started, "theirs")
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(asdict(holder)))
    dist.barrier()
    message = failing(folder, *options)
    assert message.startswith(f"Rank 0 of 2: {folder / 'checkpoint'} is written to by another run: {holder}."), message
    assert json.loads(path.read_text()) == asdict(holder)  # untouched
    dist.barrier()


CHECKS: dict[str, Callable[[Path], Any]] = {
    "a signal to one of two ranks ends both after one step, however far one runs ahead": agrees,
    "a run after that one is not ended by its signal": listens_again,
    "a folder that is not one for all ranks is refused before the first step": is_shared,
    "a folder that another run holds is refused on all ranks": is_held,
}

if __name__ == "__main__":
    main(CHECKS)
