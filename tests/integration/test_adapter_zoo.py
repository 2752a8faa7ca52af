"""Two hundred adapters that PEFT made: each is merged, loaded and given back right, or refused by name."""

from pathlib import Path

import pytest
from adapter_zoo import run

pytestmark = pytest.mark.slow


def test_there_is_no_third_outcome(tmp_path: Path) -> None:
    counts = run(200, 0, tmp_path)
    assert counts["right"] + counts["refused"] == 200 and counts["right"] > 100
    # Every trait was met, and those that are to be read were.
    for trait in ("tied", "lm_head", "rank_pattern", "alpha_pattern", "wrong fan_in_fan_out", ".default. keys",
                  "resized vocabulary", "other files in the base", "changed base", "DoRA", "hub's names",
                  "trainable tokens"):  # fmt: skip
        assert counts[trait] >= 5, trait
