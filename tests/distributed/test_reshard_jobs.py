from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from parity import train_row
from reshard_jobs import FROM_TO, JOBS, ROWS, checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    for one in {row.one_rank for row in ROWS.values()}:
        if (bases / f"{one.key}.pt").exists():  # made with the bases, for rows of the table
            continue
        torch.save(train_row(one, bases / f"run-{one.key}", bases), bases / f"{one.key}.pt")
    folder = bases / "jobs-2"
    folder.mkdir()
    return launch("reshard_jobs.py", ranks=2, folder=folder, checks=list(checks(bases)))


@pytest.mark.parametrize(("saved", "layout"), FROM_TO)
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_trains_more_than_factors_continues_on_another_layout(
    verdicts: dict[str, Any], job: str, saved: str, layout: str
) -> None:
    verdict = verdicts[f"{job}: {saved} to {layout}"]
    assert not verdict["error"], verdict["error"]
