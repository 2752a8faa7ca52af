"""The examples run and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

pytestmark = pytest.mark.slow


def test_a_rollout_actor_follows_the_trainers_through_ray() -> None:
    """Each update's logits are compared by the example itself; bytes shipped stand beside those of a full sync."""
    result = subprocess.run([sys.executable, "examples/ray_sync.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    updates = re.findall(r"^update (\d): ([\d,]+) bytes instead of ([\d,]+), logits differ", result.stdout, re.M)
    assert [number for number, _, _ in updates] == ["0", "1", "2"]
    shipped, whole = (int(text.replace(",", "")) for text in updates[0][1:])
    assert shipped < whole / 20
    assert "view" not in result.stderr  # FSDP2's warning of results that are views


def test_gpt2_is_adapted_trained_disabled_saved_and_merged(tmp_path: Path) -> None:
    start = sum(os.times()[2:4])
    command = [sys.executable, "examples/gpt2_library.py", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sum(os.times()[2:4]) - start < 60  # seconds of processors, whatever else they do
    base, adapted = map(
        float, re.search(r"^unseen rows: base ([\d.]+), adapted ([\d.]+)$", result.stdout, re.M).groups()
    )
    assert adapted < base - 1
    assert f"read back: {adapted:.3f}\n" in result.stdout
    assert f"merged, in transformers alone: {adapted:.3f}\n" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}
