"""Each layout against one rank on the same global batches.

CI runs six layouts of the table and most rows of what layouts meet in practice; `scripts/parity.sh`, which sets
LORA_PARITY=all, runs the whole table, and prints all of it.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from launch import launch
from parity import ALL_ROWS, BY_HAND, COMPILED, QUICK, SIX, TABLE

NO_COMPILER = shutil.which("g++") is None
WHOLE_TABLE = os.environ.get("LORA_PARITY") == "all"
LEFT_OUT = {*TABLE, *BY_HAND} - {*SIX, *QUICK}
ROWS = [name for name in ALL_ROWS if WHOLE_TABLE or name not in LEFT_OUT]


@pytest.fixture(scope="session")
def verdicts(bases: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The rows that are asked for, one launch per number of ranks. Of all it also writes outputs/parity.md."""
    found: dict[str, Any] = {}
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    names = [name for name in ROWS if name in asked and not (name in COMPILED and NO_COMPILER)]
    for ranks in sorted({ALL_ROWS[name].ranks for name in names}):
        rows = [name for name in names if ALL_ROWS[name].ranks == ranks]
        folder = bases / f"{ranks}-ranks"
        folder.mkdir()
        found.update(launch("parity.py", ranks=ranks, folder=folder, checks=rows))
    if WHOLE_TABLE:
        write_table(ROOT / "outputs" / "parity.md", found)
    return found


def write_table(path: Path, verdicts: dict[str, Any]) -> None:
    lines = ["| layout | ranks | loss | gradient norm | final adapter |", "|---|---|---|---|---|"]
    for name, row in ALL_ROWS.items():
        figures = verdicts.get(name, {}).get("figures") or {}
        loss, norm, adapter = (f"{figures.get(key, float('nan')):.1e}" for key in ("loss", "grad_norm", "adapter"))
        lines.append(f"| {name} | {row.ranks} | {loss} | {norm} | {adapter} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in ROWS])
def test_a_layout_is_the_run_of_one_rank(verdicts: dict[str, Any], name: str) -> None:
    """Initial adapters are compared bit for bit where the row runs. fp32; other orders of sums."""
    if name in COMPILED and NO_COMPILER:
        pytest.skip("torch.compile needs a C++ compiler for CPU kernels: no g++")
    assert not verdicts[name]["error"], verdicts[name]["error"]
    figures, rounding = verdicts[name]["figures"], ALL_ROWS[name].rounding
    assert figures["loss"] < 1e-6 * rounding
    assert figures["adapter"] < 1e-4 * rounding
    assert figures["grad_norm"] < 1e-5 * rounding
