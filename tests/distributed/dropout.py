"""Dropout's mask in the backward is that of the forward, on each layout and with every kind of recomputation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from derivative import relative_error
from harness import finish
from launch import main
from parity import ALL_ROWS, COMPILE, FULL_AC, OP_SAC, SIX, STEPS, build_row, fill_b, losses_of

MODES = {"no AC": [], "full AC": FULL_AC, "op AC": OP_SAC, "compiled": COMPILE}
HALF = "--lora.dropout=0.5"


def check(layout: str, mode: str) -> Callable[[Path], float]:
    def run_it(folder: Path) -> float:
        torch._dynamo.reset()
        run = build_row(ALL_ROWS[layout], folder, folder.parent.parent, HALF, *MODES[mode])
        run.trainer.checkpointer.load()
        fill_b(run)
        error = relative_error(run)
        run.trainer.close()
        assert error < 5e-3, error  # as on one rank
        return error

    return run_it


def resumed(folder: Path) -> None:
    """A pipeline's first forward in a process is no step's, and finds out shapes."""
    row, bases = ALL_ROWS["PP2 1F1B"], folder.parent.parent
    runs = []
    for name, steps in (("whole", STEPS), ("parts", STEPS // 2), ("parts", STEPS)):
        more = (HALF, f"--training.steps={steps}", f"--lr_scheduler.total_steps={STEPS}")
        runs.append(build_row(row, folder / name, bases, *more))
        finish(runs[-1])
    whole, first, second = map(losses_of, runs)
    assert [*first, *second] == whole, (first, second, whole)


CASES = [
    # MoE with op AC ends in torchtitan's own error, with and without adapters: FSDP2's hooks are recomputed otherwise.
    *((layout, m) for layout in SIX for m in ("no AC", "full AC", "op AC") if (layout, m) != ("MoE, EP2", "op AC")),
    *((layout, "compiled") for layout in ("FSDP2", "TP2", "DDP2")),
]
CHECKS: dict[str, Callable[[Path], Any]] = {f"{layout}, {mode}": check(layout, mode) for layout, mode in CASES}
RANKS = {f"{layout}, {mode}": ALL_ROWS[layout].ranks for layout, mode in CASES}
CHECKS["PP2, resumed"], RANKS["PP2, resumed"] = resumed, 2


if __name__ == "__main__":
    main(CHECKS)
