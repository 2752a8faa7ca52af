"""The examples run and show what they promise."""

import re
import subprocess
import sys

from harness import ROOT


def test_a_rollout_actor_follows_the_trainers_through_ray() -> None:
    """Each update's logits are compared by the example itself; bytes shipped stand beside those of a full sync."""
    result = subprocess.run([sys.executable, "examples/ray_sync.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    updates = re.findall(r"^update (\d): ([\d,]+) bytes instead of ([\d,]+), logits differ", result.stdout, re.M)
    assert [number for number, _, _ in updates] == ["0", "1", "2"]
    shipped, whole = (int(text.replace(",", "")) for text in updates[0][1:])
    assert shipped < whole / 20
    assert "view" not in result.stderr  # FSDP2's warning of results that are views
