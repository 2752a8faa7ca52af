"""Step folders that older versions wrote are still read. tests/assets/step-of-* were written by those versions.

Each is of the tiny Llama of `harness.py` with rank 2 on `layers.1.attention.wq`, at step 2, on the base that
`save_tiny_llama` makes.
"""

import shutil
from pathlib import Path

import pytest
import torch
from harness import ROOT, adapter_state, build, finish

from lora_converter.cli import main
from lora_converter.peft import load_peft

STEPS = sorted((ROOT / "tests" / "assets").glob("step-of-*/step-2"))
SETTINGS = ["--lora.rank=2", "--lora.target_modules=layers.1.attention.wq"]


@pytest.mark.parametrize("step", STEPS, ids=[step.parent.name for step in STEPS])
def test_a_run_goes_on_from_it_and_its_adapter_is_exported(step: Path, hf_base: Path, tmp_path: Path) -> None:
    shutil.copytree(step, tmp_path / "run" / "checkpoint" / "step-2")
    base = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    # Another machine's random numbers may make another base of the same seed.
    run = build(tmp_path / "run", *base, *SETTINGS, "--lora.accept_other_base", "--training.steps=3")
    finish(run)
    assert len(run.losses) == 1 and run.trainer.step == 3
    assert main(["export", "--checkpoint", str(step), "--output", str(tmp_path / "adapter")]) == 0
    exported = load_peft(tmp_path / "adapter")
    assert list(exported.factors) == ["model.layers.1.self_attn.q_proj"] and exported.rank == 2
    start = build(
        tmp_path / "next", *base, *SETTINGS, "--lora.accept_other_base", f"--lora.initial_adapter_path={step}"
    )
    start.trainer.checkpointer.load()
    a, _ = exported.factors["model.layers.1.self_attn.q_proj"]
    assert torch.equal(adapter_state(start)["layers.1.attention.wq.lora_a.weight"], a)
    start.trainer.close()


def test_there_is_one_of_every_version() -> None:
    assert [step.parent.name for step in STEPS] == ["step-of-0.1.0"]
