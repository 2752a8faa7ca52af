"""Each layout against one rank on the same global batches. `scripts/parity.sh` prints the table."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from launch import launch
from parity import ALL_ROWS, COMPILED, TABLE

NO_COMPILER = shutil.which("g++") is None


@pytest.fixture(scope="session")
def verdicts(bases: Path) -> dict[str, Any]:
    """All rows, one launch per number of ranks. Also writes outputs/parity.md, the README's table."""
    found: dict[str, Any] = {}
    for ranks in sorted({row.ranks for row in ALL_ROWS.values()}):
        rows = [name for name, row in ALL_ROWS.items() if row.ranks == ranks and not (name in COMPILED and NO_COMPILER)]
        folder = bases / f"{ranks}-ranks"
        folder.mkdir()
        found.update(launch("parity.py", ranks=ranks, folder=folder, checks=rows))
    write_table(ROOT / "outputs" / "parity.md", found)
    return found


def write_table(path: Path, verdicts: dict[str, Any]) -> None:
    lines = ["| layout | ranks | loss | gradient norm | final adapter |", "|---|---|---|---|---|"]
    for name, row in TABLE.items():
        figures = verdicts[name]["figures"] or {}
        loss, norm, adapter = (f"{figures.get(key, float('nan')):.1e}" for key in ("loss", "grad_norm", "adapter"))
        lines.append(f"| {name} | {row.ranks} | {loss} | {norm} | {adapter} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ALL_ROWS)
def test_a_layout_is_the_run_of_one_rank(verdicts: dict[str, Any], name: str) -> None:
    """Initial adapters are compared bit for bit where the row runs. fp32; other orders of sums."""
    if name in COMPILED and NO_COMPILER:
        pytest.skip("torch.compile needs a C++ compiler for CPU kernels: no g++")
    assert not verdicts[name]["error"], verdicts[name]["error"]
    figures = verdicts[name]["figures"]
    assert figures["loss"] < 1e-5
    assert figures["adapter"] < 1e-4
    assert figures["grad_norm"] < 1e-5
