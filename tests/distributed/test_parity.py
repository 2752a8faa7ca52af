"""The parity table: each layout against one rank on the same global batches. `scripts/parity.sh` prints it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, build
from hf_models import save_tiny_llama
from launch import launch
from parity import LAYOUTS, MOE, train_row

MANY = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks > 1]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases and, beside each, the run of one rank."""
    folder = tmp_path_factory.mktemp("parity")
    save_tiny_llama(folder / "llama")
    seed = build(folder / "moe", *MOE, "--checkpoint.initial_load_path=", "--checkpoint.create_seed_checkpoint")
    seed.trainer.checkpointer.save(curr_step=0, last_step=True)
    seed.trainer.close()
    torch.save(train_row("1 rank", folder / "llama-run", folder), folder / "llama.pt")
    torch.save(train_row("MoE, 1 rank", folder / "moe-run", folder), folder / "moe.pt")
    return folder


@pytest.fixture(scope="session")
def verdicts(bases: Path) -> dict[str, Any]:
    """All rows, one launch per number of ranks. Also writes outputs/parity.json for the README's table."""
    found: dict[str, Any] = {}
    for ranks in sorted({ranks for ranks, _ in LAYOUTS.values()} - {1}):
        rows = [layout for layout, (needed, _) in LAYOUTS.items() if needed == ranks]
        folder = bases / f"{ranks}-ranks"
        folder.mkdir()
        found.update(launch("parity.py", ranks=ranks, folder=folder, checks=rows))
    write_table(ROOT / "outputs" / "parity.md", found)
    return found


def write_table(path: Path, verdicts: dict[str, Any]) -> None:
    """The README's table."""
    lines = ["| layout | ranks | loss | gradient norm | final adapter |", "|---|---|---|---|---|"]
    for layout in MANY:
        figures = verdicts[layout]["figures"] or {}
        norm = "see limits" if "PP" in layout else f"{figures.get('grad_norm', float('nan')):.1e}"
        loss, adapter = (f"{figures.get(name, float('nan')):.1e}" for name in ("loss", "adapter"))
        lines.append(f"| {layout} | {LAYOUTS[layout][0]} | {loss} | {norm} | {adapter} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("layout", MANY)
def test_a_layout_is_the_run_of_one_rank(verdicts: dict[str, Any], layout: str) -> None:
    """Initial adapters are compared bit for bit where the row runs. fp32; other orders of sums."""
    assert not verdicts[layout]["error"], verdicts[layout]["error"]
    figures = verdicts[layout]["figures"]
    assert figures["loss"] < 1e-5
    assert figures["adapter"] < 1e-4
    if "PP" not in layout:  # torchtitan 0.2.2 does not divide PP's gradients by the token count
        assert figures["grad_norm"] < 1e-5
