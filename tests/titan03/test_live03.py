from pathlib import Path

import pytest
from jobs03 import BACKENDS
from launch import launch
from live03 import CHECKS, use


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_turned_off_merged_and_exchanged_on_one_rank(backend: str, tmp_path: Path) -> None:
    use(tmp_path, backend, {})


def test_adapters_are_turned_off_merged_and_exchanged_on_shards(tmp_path: Path) -> None:
    found = launch("../titan03/live03.py", ranks=2, folder=tmp_path, checks=list(CHECKS))
    assert not any(verdict["error"] for verdict in found.values()), found
