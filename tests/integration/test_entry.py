"""The commands a user types: options, help, and a trainer of torchtitan's that nobody changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, TINY_ARGS, parse

from lora_converter.titans import cpu

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, COLUMNS="80"))


def test_every_option_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    lora = parse(
        tmp_path,
        "--lora.rank=8",
        "--lora.alpha=4",
        "--lora.dropout=0.1",
        "--lora.use_rslora",
        "--lora.target_modules=wq,attention.wk",
        "--lora.exclude_modules=layers.0.*",
        "--lora.initial_adapter_path=/some/step",
        "--lora.save_merged",
        "--lora.full_phase.steps=5",
        "--lora.full_phase.lr=0.5",
        "--lora.full_phase.dataset=c4",
        "--lora.full_phase.dataset_path=/data",
    ).lora
    phase = lora.full_phase
    assert lora.save_merged and (phase.steps, phase.lr, phase.dataset, phase.dataset_path) == (5, 0.5, "c4", "/data")
    assert (lora.rank, lora.alpha, lora.dropout, lora.use_rslora) == (8, 4.0, 0.1, True)
    assert (lora.target_modules, lora.exclude_modules) == (["wq", "attention.wk"], ["layers.0.*"])
    assert lora.initial_adapter_path == "/some/step" and lora.scaling == 4 / 8**0.5
    assert parse(tmp_path, "--lora.exclude_modules=").lora.exclude_modules == []


def test_help_explains_every_option() -> None:
    result = run(sys.executable, "-m", "lora_converter.train", "--job.config_file", "configs/debug_lora.toml", "--help")
    shown = " ".join(result.stdout.replace("│", " ").split())
    assert result.returncode == 0, result.stderr
    for option, text in {
        "--lora.rank": "Rows of A and columns of B: the rank of the weight update.",
        "--lora.alpha": "Numerator of the scaling of the update, alpha / rank.",
        "--lora.dropout": "Probability of dropping an element of the adapter's input during training",
        "--lora.use-rslora": "Scale the update by alpha / sqrt(rank)",
        "--lora.target-modules": "Linears that get an adapter: 'all-linear'",
        "--lora.exclude-modules": "Linears that get none although target_modules names them.",
        "--lora.save-merged": "At the end also write base + adapter as a Hugging Face directory",
        "--lora.full-phase.steps": "Steps that train every weight before the adapters; 0 for none.",
        "--lora.full-phase.lr": "Learning rate of these steps",
        "--lora.full-phase.dataset": "Dataset of these steps",
        "--lora.initial-adapter-path": "Adapters that this run starts from: a step folder",
    }.items():
        assert option in shown.replace("_", "-") and text in shown, option


@pytest.mark.parametrize("entry", ["ours", "torchtitan's own"])
def test_both_entries_train_from_the_toml_file(entry: str, hf_base: Path, tmp_path: Path) -> None:
    """torchtitan's own module, as `__main__`, needs no accelerator once `cpu.prepare` has run."""
    script = tmp_path / "torchtitan_main.py"
    script.write_text(
        "import runpy\nfrom lora_converter.titans import cpu\ncpu.prepare()\n"
        "import sys\nsys.argv[0] = 'torchtitan.train'\n"
        "runpy.run_module('torchtitan.train', run_name='__main__')\n"
    )
    program = ["-m", "lora_converter.train"] if entry == "ours" else [str(script)]
    arguments = [argument for argument in TINY_ARGS if "flavor" not in argument]
    result = run(
        *TORCHRUN,
        *program,
        "--job.config_file=configs/debug_lora.toml",
        *arguments,
        "--checkpoint.initial_load_path=",
        f"--job.dump_folder={tmp_path}",
        "--training.steps=1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    log = result.stdout + result.stderr
    assert "LoRA: 42 linears adapted (rank 16, alpha 32), 492K of 6.66M parameters train (7.39 %)" in log
    assert "LoRA: checkpoint.initial_load_path is not set" in log  # our checkpointer, found by the unchanged trainer
    assert (tmp_path / "checkpoint" / "step-1" / ".metadata").exists()


def test_a_toml_file_without_the_config_module_names_the_missing_line(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('[model]\nconverters = ["lora"]\n[lora]\nrank = 8\n')
    result = run(sys.executable, "-m", "lora_converter.train", "--job.config_file", str(config))
    assert result.returncode == 1
    assert 'add custom_config_module = "lora_converter.titan" under [job].' in result.stderr.splitlines()[-1]


def test_a_torchtitan_that_chose_a_missing_device_is_refused() -> None:
    code = "import torchtitan.tools.utils; from lora_converter.titans import cpu; cpu.prepare()"
    result = run(sys.executable, "-c", code)
    assert "has chosen 'cuda', which this machine does not have. Call prepare() first" in result.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.toml")))
def test_every_config_parses_names_a_flavor_that_exists_and_shows_its_command(name: str) -> None:
    import importlib

    from torchtitan.config import ConfigManager

    path = ROOT / "configs" / f"{name}.toml"
    config = ConfigManager().parse_args(["--job.config_file", str(path)])
    spec = importlib.import_module(f"torchtitan.models.{config.model.name}").get_train_spec()
    assert config.model.flavor in spec.model_args
    head = path.read_text().split("\n[")[0]
    assert "torchrun " in head and f"configs/{name}.toml" in head
    if "_chat_" in name:
        assert config.training.dataset == "chat" and config.chat.epochs > 0 and config.checkpoint.last_save_in_hf
        assert 0 < config.chat.validation_split < 1 and config.validation.enable
        assert f"lora-converter chat-data configs/{name}.toml" in head


def test_memory_figures_on_cpu_are_resident_memory_and_its_peak_can_be_reset() -> None:
    cpu._reset_peak_memory()
    before = cpu._memory_stats()["active_bytes.all.peak"]
    block = torch.ones(50_000_000)  # 200 MB
    during = cpu._memory_stats()["active_bytes.all.peak"]
    del block
    cpu._reset_peak_memory()
    after = cpu._memory_stats()["active_bytes.all.peak"]
    assert during - before > 190e6 and during - after > 190e6
    assert before < cpu._total_memory()
