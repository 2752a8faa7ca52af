"""Two ranks, one launch for each file of checks that is imported here."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collectives
import live
import no_gradient
import operation
import packed_layers
import pytest
import remedies
import trouble
from launch import launch

QUICK, SLOW = (collectives, live, trouble, operation, packed_layers), (remedies, no_gradient)
CHECKS = {check: module for module in (*QUICK, *SLOW) for check in module.CHECKS}


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> Callable[[str], Any]:
    """That of a check; the first one of a file launches all of them."""

    @functools.cache
    def launched(name: str, *checks: str) -> dict[str, Any]:
        folder = bases / name
        folder.mkdir()
        return launch(f"{name}.py", ranks=2, folder=folder, checks=checks)

    return lambda check: launched(CHECKS[check].__name__, *CHECKS[check].CHECKS)[check]


@pytest.mark.parametrize(
    "claim", [pytest.param(check, marks=[pytest.mark.slow] * (module in SLOW)) for check, module in CHECKS.items()]
)
def test_two_ranks(verdicts: Callable[[str], Any], claim: str) -> None:
    assert not verdicts(claim)["error"], verdicts(claim)["error"]
