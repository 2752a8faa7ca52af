"""The comparison tool, and with it the trainer from a TOML file with torch's default AdamW eps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import loss_compare
from loss_compare import Run, batch_options, export_losses, import_losses, pairs, report

REFERENCE = ROOT / "tests" / "assets" / "losses_debug_lora.txt"
RANDOM_BASE = "--options=--checkpoint.initial_load_path= --training.seq_len=64"


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "scripts/loss_compare.py",
        "--config=configs/debug_lora.toml",
        f"--output-folder={folder}",
    ]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))


@pytest.mark.slow
def test_tensor_parallel_losses_from_a_toml_file_are_those_of_one_rank_and_of_the_reference(tmp_path: Path) -> None:
    """20 steps. Default eps lets AdamW turn rounding into steps, and other CPUs round otherwise: hence 1e-4.

    The reference was written by `--export-result` with these options.
    """
    result = compare(
        tmp_path,
        RANDOM_BASE,
        "--steps=20",
        "--run=one=",
        "--run=tp2=--parallelism.tensor_parallel_degree=2",
        "--run=tp2 x fsdp2=--parallelism.tensor_parallel_degree=2",
        "--run=cp2 x tp2=--parallelism.tensor_parallel_degree=2 --parallelism.context_parallel_degree=2",
        "--run=pp2 x tp2 x fsdp2=--parallelism.tensor_parallel_degree=2 --parallelism.pipeline_parallel_degree=2 "
        "--parallelism.pipeline_parallel_microbatch_size=2",
        "--ranks=tp2=2",
        "--ranks=tp2 x fsdp2=4",
        "--ranks=cp2 x tp2=4",
        "--ranks=pp2 x tp2 x fsdp2=8",
        "--rtol=1e-4",
        f"--import-result={REFERENCE}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    layouts = ["tp2", "tp2 x fsdp2", "cp2 x tp2", "pp2 x tp2 x fsdp2"]
    assert all(f"{layout} against one: ok" in result.stdout for layout in layouts)
    assert f"one against {REFERENCE}: ok" in result.stdout
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == ",".join(["step", "one", *layouts]) and len(lines) == 21
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ranks_and_full_fine_tuning_are_compared_and_a_difference_fails(tmp_path: Path) -> None:
    result = compare(
        tmp_path,
        RANDOM_BASE,
        "--steps=2",
        "--run=r8=--lora.rank=8",
        "--run=full=",
        "--config-of=full=configs/debug_base.toml",
        "--assert-equal",
    )
    assert result.returncode == 1, result.stdout + result.stderr
    # One base and one batch: the first loss is equal, since B is zero; the second is not.
    assert "full against r8: FAIL, max relative difference" in result.stdout and "at step 2" in result.stdout


def test_losses_survive_export_and_import_exactly(tmp_path: Path) -> None:
    losses = {1: 8.123456789012345, 2: 1e-7}
    export_losses(losses, tmp_path / "losses.txt")
    assert import_losses(tmp_path / "losses.txt") == losses


@pytest.mark.parametrize(
    ("losses", "tolerance", "agrees"),
    [
        ({1: 1.0, 2: 2.0}, (0.0, 0.0), True),
        ({1: 1.0, 2: 2.0000002}, (0.0, 0.0), False),
        ({1: 1.0, 2: 2.0000002}, (1e-6, 0.0), True),
        ({1: 1.0, 2: 2.1}, (0.0, 0.2), True),
        ({1: 1.0}, (1.0, 1.0), False),
        ({1: 1.0, 2: float("nan")}, (1.0, 1.0), False),
        ({1: 5.0, 2: 2.0}, (float("inf"), 0.0), True),
    ],
)
def test_a_run_agrees_within_its_tolerance_alone(losses: dict, tolerance: tuple[float, float], agrees: bool) -> None:
    assert report(Run("test", [], "", losses=losses), "base", {1: 1.0, 2: 2.0}, tolerance) is agrees


@pytest.mark.parametrize(
    ("ranks", "options", "local"),
    [
        (1, [], 8),
        (2, ["--parallelism.tensor_parallel_degree=2"], 8),
        (2, [], 4),
        (4, ["--parallelism.tensor_parallel_degree=2"], 4),
        (4, ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=2"], 2),
        (4, ["--parallelism.data_parallel_replicate_degree=2"], 2),
    ],
)
def test_the_global_batch_is_split_over_data_parallel_ranks(ranks: int, options: list[str], local: int) -> None:
    config = str(ROOT / "configs" / "debug_lora.toml")
    chosen = batch_options(Run("many", options, config, ranks), Run("one", [], config))
    assert chosen == ["--training.global_batch_size=8", f"--training.local_batch_size={local}"]


def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'tp2': write NAME=VALUE"):
        pairs(["tp2"])
    with pytest.raises(SystemExit, match="a global batch of 8 does not split over 3 data-parallel ranks"):
        config = str(ROOT / "configs" / "debug_lora.toml")
        batch_options(Run("three", [], config, 3), Run("one", [], config))
    assert loss_compare.__doc__
    result = compare(tmp_path, "--run=a=", "--run=b=", "--ranks=c=2")
    assert result.returncode == 1 and "--ranks and --config-of name c; the runs are a, b." in result.stderr
