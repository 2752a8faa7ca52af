from pathlib import Path
from typing import Any

import pytest
import torch
from expert_layouts import REFERENCE, SAVED, SAVED_ON, checks
from launch import launch
from parity import train_row
from reshard import HALF, save

from lora_converter.cli import main

pytestmark = pytest.mark.slow
NAMES = [*checks(Path(), 2), *(f"resume on 1 rank from {layout}" for layout in SAVED_ON)]


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    """One rank trains to the end, and to the middle, in this process; then a launch of two ranks, and one of one."""
    torch.save(train_row(REFERENCE, bases / "run-of-experts", bases), bases / f"{REFERENCE.key}.pt")
    save(SAVED_ON["1 rank"], bases / SAVED / "1 rank", bases)
    step = bases / SAVED / "1 rank" / "checkpoint" / f"step-{HALF}"
    assert main(["export", "--checkpoint", str(step), "--output", str(bases / "experts in PEFT" / "1 rank")]) == 0
    found: dict[str, Any] = {}
    for ranks in (2, 1):
        folder = bases / f"experts-{ranks}"
        folder.mkdir()
        names = [name for name in checks(bases, ranks) if name != "save on 1 rank"]
        found.update(launch("expert_layouts.py", ranks=ranks, folder=folder, checks=names))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_adapted_experts_on_two_ranks(verdicts: dict[str, Any], name: str) -> None:
    assert not verdicts[name]["error"], verdicts[name]["error"]
