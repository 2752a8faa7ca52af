"""Checkpoints move between layouts: a run stopped at step 5 under one is continued under another.

The losses of steps 6 to 10 must be those of one rank that was never stopped; AdamW's moments are in them.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import build, finish
from launch import main
from parity import (
    FSDP2,
    PISSA,
    PP2,
    STEPS,
    TP2,
    Row,
    build_row,
    losses_of,
    relative,
    row,
    whole_adapter,
)
from tiny_models import base_options

HALF = STEPS // 2

SAVED_ON = {"1 rank": row(1), "FSDP2": row(2, FSDP2), "TP2": row(2, TP2), "PP2": row(2, PP2)}
RESUMED_ON = {**SAVED_ON, "TP2 x PP2": row(4, TP2, PP2)}
PISSA_ON = {"1 rank": row(1, job=PISSA), "FSDP2": row(2, FSDP2, job=PISSA), "PP2": row(2, PP2, job=PISSA)}
"""Resumed on; saved on TP2. What factors began at is in the step, and nobody decomposes a weight again."""
EXPORTED_FROM = {**SAVED_ON, "TP2 x PP2 x FSDP2": row(8, TP2, PP2, FSDP2)}


def save(row: Row, folder: Path, bases: Path) -> None:
    """Trains to step 5 of 10 and stops."""
    options = [f"--training.steps={HALF}", f"--lr_scheduler.total_steps={STEPS}"]
    finish(build_row(row, folder, bases, *options))


def resume(row: Row, folder: Path, bases: Path) -> dict[str, float]:
    """Steps 6 to 10 have the losses of one rank that was never stopped.

    The data loader's state belongs to a data-parallel degree; the batches are fed here anyway.
    """
    options = ["--checkpoint.load_only", "--checkpoint.exclude_from_loading=dataloader"]
    run = build_row(row, folder, bases, *options)
    finish(run)
    reference = torch.load(bases / f"{row.one_rank.key}.pt", weights_only=True)["losses"]
    difference = relative(losses_of(run), reference[HALF:])
    assert difference < 1e-5, difference
    return {"loss": difference}


def resume_pissa(row: Row, folder: Path, bases: Path) -> dict[str, float]:
    with mock.patch("lora_converter.run.initial_factors.initial_factors", None):
        return resume(row, folder, bases)


def export(layout: str, bases: Path) -> None:
    """One trained state as a PEFT directory, which is then the start of another run on the same layout."""
    folder = bases / "exported" / layout
    trained = f"--lora.initial_adapter_path={bases}/saved/1 rank/checkpoint/step-{HALF}"
    run = build(folder / "run", *base_options("llama3", bases), *EXPORTED_FROM[layout].layout, trained)
    run.trainer.checkpointer.load()
    run.trainer.checkpointer.run.write_peft(str(folder / "peft"))
    dist.barrier()  # only rank 0 writes, and nobody waits for it
    expected = whole_adapter(run)
    run.trainer.close()

    start = [f"--lora.initial_adapter_path={folder}/peft", "--lora.rank=16"]
    run = build(folder / "next", *base_options("llama3", bases), *EXPORTED_FROM[layout].layout, *start)
    run.trainer.checkpointer.load()
    imported = whole_adapter(run)
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], value) for name, value in expected.items())
    run.trainer.close()


def checks(bases: Path, ranks: int) -> dict[str, Any]:
    """All saves of layouts with so many ranks, then all resumes."""
    found: dict[str, Any] = {
        f"save on {layout}": lambda _, row=needs, folder=bases / "saved" / layout: save(row, folder, bases)
        for layout, needs in SAVED_ON.items()
        if needs.ranks == ranks
    }
    for layout, needs in RESUMED_ON.items():
        for saved in SAVED_ON:
            if needs.ranks == ranks:
                folder = bases / "saved" / saved
                found[f"resume on {layout} from {saved}"] = lambda _, row=needs, f=folder: resume(row, f, bases)
    folder = bases / "saved" / "PiSSA"
    if ranks == 2:
        found["save PiSSA on TP2"] = lambda _: save(row(2, TP2, job=PISSA), folder, bases)
    for layout, needs in PISSA_ON.items():
        if needs.ranks == ranks == 2:
            found[f"resume PiSSA on {layout}"] = lambda _, row=needs: resume_pissa(row, folder, bases)
    for layout, needs in EXPORTED_FROM.items():
        if needs.ranks == ranks:
            found[f"export on {layout}"] = lambda _, layout=layout: export(layout, bases)
    return found


if __name__ == "__main__":
    import os
    import sys

    main(checks(Path(sys.argv[1]).parent, int(os.environ["WORLD_SIZE"])))
