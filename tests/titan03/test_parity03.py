"""Each layout of torchtitan 0.3, under both of its backends, against one rank on the same global batches."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs03 import BACKENDS
from launch import launch
from parity03 import BY_HAND, TABLE

ROWS = [name for name in TABLE if os.environ.get("LORA_PARITY") == "all" or not name.startswith(BY_HAND)]


@pytest.fixture(scope="session")
def verdicts(bases: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Row -> what became of it, of those that are asked for."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    found: dict[str, Any] = {}
    for ranks in sorted({TABLE[name][0].ranks for name in ROWS}):
        (bases / str(ranks)).mkdir()
        rows = [name for name in ROWS if name in asked and TABLE[name][0].ranks == ranks]
        found |= launch("../titan03/parity03.py", ranks=ranks, folder=bases / str(ranks), checks=rows) if rows else {}
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_is_the_run_of_one_rank(verdicts: dict[str, Any], name: str) -> None:
    """Initial adapters are compared bit for bit where the row runs. fp32; other orders of sums, as on 0.2.2."""
    assert not verdicts[name]["error"], verdicts[name]["error"]
    figures = verdicts[name]["figures"]
    print(name, {key: f"{value:.1e}" for key, value in figures.items()})
    assert figures["loss"] < 1e-6
    assert figures["adapter"] < 1e-4
    assert figures["grad_norm"] < 1e-5


def test_the_backends_compute_the_same_on_one_rank(bases: Path) -> None:
    first, second = (torch.load(bases / f"{backend}.pt", weights_only=True) for backend in BACKENDS)
    assert first["losses"] == second["losses"] and first["grad_norms"] == second["grad_norms"]
