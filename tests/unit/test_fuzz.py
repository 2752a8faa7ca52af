"""Damaged files are read or refused, and nothing else: 10,000 of them, in `fuzz.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

pytestmark = pytest.mark.slow

FILES = {"PEFT directories": 4000, "merges": 2000, "step folders": 1500, "merge records": 500, "packages": 2000}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), str(tmp_path_factory.mktemp("fuzz"))]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])]))
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind: str, found: dict[str, dict[str, float]]) -> None:
    outcome = found[kind]
    assert outcome.get("read", 0) + outcome["refused"] == FILES[kind]
    assert outcome["refused"] > FILES[kind] / 2
    # A checksum stands over all of a package; elsewhere some damage is to values alone, or to nothing that is read.
    assert outcome.get("read", 0) > FILES[kind] / 100 or kind == "packages"
    assert outcome["memory"] < 2, outcome
