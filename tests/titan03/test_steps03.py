"""Steps of a run on torchtitan 0.3 hold what was trained, and any layout and backend goes on from them."""

from pathlib import Path
from typing import Any

import pytest
from launch import launch
from steps03 import CHECKS, FROM_TO


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    (bases / "steps").mkdir()
    return launch("../titan03/steps03.py", ranks=2, folder=bases / "steps", checks=list(CHECKS))


@pytest.mark.parametrize("name", FROM_TO)
def test_a_run_goes_on_where_another_layout_left_it(verdicts: dict[str, Any], name: str) -> None:
    """Compared with the run of one rank, as the parity table is."""
    for check in (FROM_TO[name][0], name):
        assert not verdicts[check]["error"], verdicts[check]["error"]
    figures = verdicts[name]["figures"]
    assert figures["loss"] < 1e-6
    assert figures["adapter"] < 1e-4
    assert figures["grad_norm"] < 1e-5
