from pathlib import Path
from typing import Any

import pytest
from launch import launch
from reshard import RESUMED_ON, SAVED_ON, checks, save


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    """One rank saves in this process; then one launch per number of ranks saves and resumes."""
    save("1 rank", bases)
    found: dict[str, Any] = {}
    for ranks in (2, 4, 1):
        folder = bases / f"reshard-{ranks}"
        folder.mkdir()
        names = [name for name in checks(bases, ranks) if name != "save on 1 rank"]
        found.update(launch("reshard.py", ranks=ranks, folder=folder, checks=names))
    return found


@pytest.mark.parametrize("saved_on", SAVED_ON)
@pytest.mark.parametrize("layout", RESUMED_ON)
def test_a_run_continues_on_another_layout(verdicts: dict[str, Any], saved_on: str, layout: str) -> None:
    verdict = verdicts[f"resume on {layout} from {saved_on}"]
    assert not verdict["error"], verdict["error"]
