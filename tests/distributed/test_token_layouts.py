from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from parity import train_row
from token_layouts import EXPORTED_FROM, ROWS, checks

pytestmark = pytest.mark.slow

NAMES = [(ranks, name) for ranks in EXPORTED_FROM for name in checks(Path(), ranks) if not name.startswith("save")]


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    one = ROWS["FSDP2"].one_rank
    if not (bases / f"{one.key}.pt").exists():  # made with the bases, for rows of the table
        torch.save(train_row(one, bases / f"run-{one.key}", bases), bases / f"{one.key}.pt")
    found: dict[str, Any] = {}
    for ranks in EXPORTED_FROM:
        (folder := bases / f"new-tokens-{ranks}").mkdir()
        found |= launch("token_layouts.py", ranks=ranks, folder=folder, checks=list(checks(bases, ranks)))
    return found


@pytest.mark.parametrize("name", [name for _, name in NAMES])
def test_rows_of_new_tokens_move_between_layouts(verdicts: dict[str, Any], name: str) -> None:
    assert not verdicts[name]["error"], verdicts[name]["error"]
