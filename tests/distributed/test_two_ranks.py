"""Two ranks: `collectives`, `live`, `trouble`, `remedies`, `no_gradient` and `operation`, one launch for each."""

from pathlib import Path
from typing import Any

import collectives
import live
import no_gradient
import operation
import pytest
import remedies
import trouble
from launch import launch

MODULES = (collectives, live, trouble, remedies, no_gradient, operation)
FILES = {f"{module.__name__}.py": list(module.CHECKS) for module in MODULES}


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    found = {}
    for file, checks in FILES.items():
        folder = bases / file.removesuffix(".py")
        folder.mkdir()
        found.update(launch(file, ranks=2, folder=folder, checks=checks))
    return found


@pytest.mark.parametrize("claim", [claim for checks in FILES.values() for claim in checks])
def test_two_ranks(verdicts: dict[str, Any], claim: str) -> None:
    assert not verdicts[claim]["error"], verdicts[claim]["error"]
