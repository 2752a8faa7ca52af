from pathlib import Path
from typing import Any

import pytest
from collectives import CHECKS
from launch import launch


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    folder = bases / "collectives"
    folder.mkdir()
    return launch("collectives.py", ranks=2, folder=folder, checks=list(CHECKS))


@pytest.mark.parametrize("claim", CHECKS)
def test_two_ranks(verdicts: dict[str, Any], claim: str) -> None:
    assert not verdicts[claim]["error"], verdicts[claim]["error"]
