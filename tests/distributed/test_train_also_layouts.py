from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from parity import train_row
from train_also_layouts import FROM_TO, JOBS, ROWS, checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    for one in {row.one_rank for row in ROWS.values()}:
        if (bases / f"{one.key}.pt").exists():  # made with the bases, for rows of the table
            continue
        torch.save(train_row(one, bases / f"run-{one.key}", bases), bases / f"{one.key}.pt")
    folder = bases / "train-also-2"
    folder.mkdir()
    return launch("train_also_layouts.py", ranks=2, folder=folder, checks=list(checks(bases)))


@pytest.mark.parametrize(("saved", "layout"), FROM_TO)
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_trains_modules_in_full_continues_on_another_layout(
    verdicts: dict[str, Any], job: str, saved: str, layout: str
) -> None:
    verdict = verdicts[f"{job}: {saved} to {layout}"]
    assert not verdict["error"], verdict["error"]
