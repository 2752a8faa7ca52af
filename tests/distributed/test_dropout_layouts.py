"""`dropout.py`, one launch per number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import dropout
import pytest
from launch import launch

pytestmark = pytest.mark.slow
NO_COMPILER = shutil.which("g++") is None


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ranks in sorted(set(dropout.RANKS.values())):
        checks = [c for c, n in dropout.RANKS.items() if n == ranks and not (NO_COMPILER and "compiled" in c)]
        folder = bases / f"dropout-{ranks}"
        folder.mkdir()
        found.update(launch("dropout.py", ranks=ranks, folder=folder, checks=checks))
    return found


@pytest.mark.parametrize("claim", list(dropout.CHECKS))
def test_on_layouts(verdicts: dict[str, Any], claim: str) -> None:
    if NO_COMPILER and "compiled" in claim:
        pytest.skip("torch.compile needs a C++ compiler for CPU kernels: no g++")
    assert not verdicts[claim]["error"], verdicts[claim]["error"]
