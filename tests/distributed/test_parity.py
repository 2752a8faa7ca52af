"""Each layout against one rank on the same global batches.

CI runs six layouts of the table and most rows of what layouts meet in practice; `scripts/parity.sh`, which sets
LORA_PARITY=all, runs the whole table, and prints all of it.
"""

import os
import shutil
from collections.abc import Iterator
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


AT_A_TIME = 24
"""Rows of one launch: the time that a test may take is that of the launch that it waits for."""


class Verdicts:
    """Row -> what became of it. Rows of as many ranks share launches, each of which waits until it is asked for."""

    def __init__(self, bases: Path, names: list[str]):
        self._bases, self.found = bases, dict[str, Any]()
        self._launches: list[list[str]] = []
        for ranks in sorted({ALL_ROWS[name].ranks for name in names}):
            rows = [name for name in names if ALL_ROWS[name].ranks == ranks]
            self._launches += [rows[start : start + AT_A_TIME] for start in range(0, len(rows), AT_A_TIME)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.found:
            (rows,) = (rows for rows in self._launches if name in rows)
            folder = self._bases / f"launch-{self._launches.index(rows)}"
            folder.mkdir()
            self.found |= launch("parity.py", ranks=ALL_ROWS[name].ranks, folder=folder, checks=rows)
        return self.found[name]


@pytest.fixture(scope="session")
def verdicts(bases: Path, request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """Of the rows that are asked for. Of all it also writes outputs/parity.md."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    found = Verdicts(bases, [name for name in ROWS if name in asked and not (name in COMPILED and NO_COMPILER)])
    yield found
    if WHOLE_TABLE:
        write_table(ROOT / "outputs" / "parity.md", found.found)


def write_table(path: Path, verdicts: dict[str, Any]) -> None:
    lines = ["| layout | ranks | loss | gradient norm | final adapter |", "|---|---|---|---|---|"]
    for name, row in ALL_ROWS.items():
        figures = verdicts.get(name, {}).get("figures") or {}
        loss, norm, adapter = (f"{figures.get(key, float('nan')):.1e}" for key in ("loss", "grad_norm", "adapter"))
        lines.append(f"| {name} | {row.ranks} | {loss} | {norm} | {adapter} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in ROWS])
def test_a_layout_is_the_run_of_one_rank(verdicts: Verdicts, name: str) -> None:
    """Initial adapters are compared bit for bit where the row runs. fp32; other orders of sums."""
    if name in COMPILED and NO_COMPILER:
        pytest.skip("torch.compile needs a C++ compiler for CPU kernels: no g++")
    verdict, rounding = verdicts[name], ALL_ROWS[name].rounding
    assert not verdict["error"], verdict["error"]
    figures = verdict["figures"]
    assert figures["loss"] < 1e-6 * rounding
    assert figures["adapter"] < 1e-4 * rounding
    assert figures["grad_norm"] < 1e-5 * rounding
