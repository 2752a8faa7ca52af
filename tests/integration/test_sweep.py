"""The sweep over ranks and rates runs, goes on where it was interrupted, and reads the best rates off its curves."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import sweep

TEXT = ROOT / "tests" / "assets" / "c4_test" / "data.jsonl"
POINTS = {(curve, rate) for curve in ("rank 1", "rank 16") for rate in (1e-3, 1e-2)}
POINTS |= {(curve, rate) for curve in ("full", "linears") for rate in (1e-4, 1e-3)}


@pytest.fixture
def base(hf_base: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(hf_base, tmp_path / "base")
    return shutil.copytree(ROOT / "tests" / "assets" / "tokenizer", folder, dirs_exist_ok=True)


def arguments(base: Path, folder: Path, *more: str) -> list[str]:
    return [f"--base={base}", f"--text={TEXT}", f"--output-folder={folder}", "--seq-len=32", "--quick", *more]


def call(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    sweep.main()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_ends_with_every_point_a_table_and_a_picture(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float | None] = []
    with monkeypatch.context() as patch:

        def interrupted(*args: Any, run: Any = sweep.run) -> float | None:
            if len(losses) == 3:
                raise KeyboardInterrupt
            losses.append(run(*args))
            return losses[-1]

        patch.setattr(sweep, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(patch, arguments(base, tmp_path))
    begun = json.loads((tmp_path / "results.json").read_text())
    assert [point["loss"] for point in begun["points"]] == losses and not (tmp_path / "sweep.png").exists()

    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *arguments(base, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["points"][:3] == begun["points"] and found["settings"] == begun["settings"]
    assert {(point["curve"], point["rate"]) for point in found["points"]} == POINTS and len(found["points"]) == 8
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert len(re.findall(r"^\d/8  ", result.stdout, re.M)) == 5
    assert all(f"\n| {curve} | " in result.stdout for curve, _ in POINTS)

    # No run is touched by those before it, nor by the process that it is in.
    call(monkeypatch, arguments(base, tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())["points"]
    torch.testing.assert_close([point["loss"] for point in found["points"]], [point["loss"] for point in whole])


def test_a_sweep_under_other_settings_is_not_gone_on_with(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"base": "a", "alpha": 32.0}
    sweep.write(tmp_path / "results.json", {"settings": {"base": "a", "alpha": 16.0}, "points": []})
    with pytest.raises(SystemExit, match=r"is of another sweep \(alpha 16.0, not 32.0\); give another --output-folder"):
        sweep.resume(tmp_path / "results.json", wanted)
    with pytest.raises(SystemExit, match=r"nowhere is not there; run scripts/demo\.sh"):
        call(monkeypatch, ["--base=nowhere"])
    with pytest.raises(SystemExit, match=r"has \d+ tokens of \d+; take fewer --steps, --rows or --held-out"):
        call(monkeypatch, arguments(base, tmp_path / "long", "--rows=100000"))


def test_a_curve_trains_what_its_name_says(base: Path) -> None:
    """By transformers' names: 7 linears in each of the layers, and everything."""
    from transformers import AutoModelForCausalLM

    for curve in ("rank 4", "linears", "full"):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        everything = list(model.parameters())
        linears = [part.weight for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)]
        trained = sweep.trained_parameters(model, curve, alpha=32.0)
        assert set(trained) == {param for param in model.parameters() if param.requires_grad}
        if curve == "rank 4":
            assert len(trained) == 2 * len(linears) == 14 * len(model.model.layers)
            assert all(4 in param.shape for param in trained)
        else:
            assert set(trained) == set(linears if curve == "linears" else everything)


def test_the_best_rate_is_the_parabolas_between_rates_and_a_tried_one_at_the_ends() -> None:
    def parabola(rates: list[float], best: float) -> dict[float, float]:
        return {rate: 2 + math.log(rate / best) ** 2 for rate in rates}

    rates = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3]
    found, inside = sweep.best_rate(parabola(rates, 4e-4))
    assert found == pytest.approx(4e-4, rel=1e-6) and inside
    assert sweep.best_rate(parabola(rates, 1e-2)) == (2e-3, False)
    diverged = {**parabola(rates[:3], 1e-2), 1e-3: math.nan, 2e-3: math.nan}
    assert sweep.best_rate(diverged) == (5e-4, True)  # the next one was tried, and diverged
    text = sweep.table({"rank 1": diverged, "full": parabola(rates, 2.5e-4)})
    assert "| rank 1 | 0.0005 | 2 | 10.974 |" in text and text.count("diverged") == 2


def test_curves_are_in_the_order_of_ranks_and_rates_whatever_the_order_of_runs() -> None:
    runs = [("full", 1e-3, None), ("rank 16", 1e-2, 2.0), ("rank 4", 1e-2, 1.0), ("rank 16", 1e-3, 3.0)]
    curves = sweep.read_curves([{"curve": curve, "rate": rate, "loss": loss} for curve, rate, loss in runs])
    assert list(curves) == ["rank 4", "rank 16", "full"] and list(curves["rank 16"].items()) == [
        (1e-3, 3.0),
        (1e-2, 2.0),
    ]
    assert math.isnan(curves["full"][1e-3])
