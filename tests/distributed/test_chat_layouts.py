"""`chat_layouts.py`, one launch per number of ranks. `scripts/parity.sh` prints its figures, too."""

import os
from pathlib import Path
from typing import Any

import chat_layouts
import pytest
from harness import ROOT
from launch import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    for model, options in chat_layouts.NEEDS:
        chat_layouts.reference(bases, model, *options)
    found: dict[str, Any] = {}
    for ranks in sorted({ranks for ranks, _ in chat_layouts.CASES.values()}):
        folder = bases / f"chat-{ranks}"
        folder.mkdir()
        checks = [name for name, (needed, _) in chat_layouts.CASES.items() if needed == ranks]
        found.update(launch("chat_layouts.py", ranks=ranks, folder=folder, checks=checks))
    if os.environ.get("LORA_PARITY") == "all":
        append_table(ROOT / "outputs" / "parity.md", found)
    return found


def append_table(path: Path, verdicts: dict[str, Any]) -> None:
    lines = ["", "| conversations on | ranks | loss | gradient norm | validation loss |", "|---|---|---|---|---|"]
    for name, (ranks, _) in chat_layouts.CASES.items():
        figures = verdicts[name]["figures"] or {}
        cells = [f"{figures[key]:.1e}" if key in figures else "" for key in ("losses", "norms", "validated")]
        lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")


def test_cp_with_packing_is_the_run_of_one_rank(verdicts: dict[str, Any]) -> None:
    for claim in ("CP2", "PP2 x CP2 x FSDP2"):
        assert not verdicts[claim]["error"], verdicts[claim]["error"]


@pytest.mark.parametrize("claim", list(chat_layouts.CASES))
def test_conversations_are_the_same_on(verdicts: dict[str, Any], claim: str) -> None:
    assert not verdicts[claim]["error"], verdicts[claim]["error"]
