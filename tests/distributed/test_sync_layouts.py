from pathlib import Path

import pytest
from launch import launch
from sync_layouts import CHECKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("claim", CHECKS)
def test_four_ranks(claim: str, tmp_path: Path) -> None:
    verdict = launch("sync_layouts.py", ranks=4, folder=tmp_path, checks=[claim])[claim]
    assert not verdict["error"], verdict["error"]
    figures = verdict["figures"]
    assert figures["bytes of version 2"] < 1.1 * figures["bytes of the adapters"] + 16384  # the header: names, settings
