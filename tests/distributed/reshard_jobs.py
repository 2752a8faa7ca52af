"""Steps with more than factors move between layouts: weights of `train_also`, also where a pipeline stage has none of
them, and magnitudes (DoRA)."""

import os
import sys
from pathlib import Path
from typing import Any

from launch import main
from parity import DORA, FSDP2, IN_FULL, PP2, TP2, row
from reshard import resume, save

JOBS = {"in full": IN_FULL, "the last norm": ("--lora.train_also=norm",), "DoRA": DORA}
LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}
FROM_TO = [("PP2", "PP2"), ("PP2", "TP2"), ("FSDP2", "PP2")]
ROWS = {(job, layout): row(2, options, job=JOBS[job]) for job in JOBS for layout, options in LAYOUTS.items()}


def checks(bases: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for job in JOBS:
        for saved in dict.fromkeys(source for source, _ in FROM_TO):
            at = bases / "jobs" / job / saved
            found[f"{job}: save on {saved}"] = lambda _, r=ROWS[job, saved], at=at: save(r, at, bases)
        for saved, layout in FROM_TO:
            at = bases / "jobs" / job / saved
            found[f"{job}: {saved} to {layout}"] = lambda _, r=ROWS[job, layout], at=at: resume(r, at, bases)
    return found


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(checks(Path(sys.argv[1]).parent))
