"""`lora.train_also` beside what else a job does: packed and float8 bases, compile, activation checkpointing, phases."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import Run, Trainer, adapter_state, build, finish, parse, start_process_group, train
from parity import COMPILE, FULL_AC
from safetensors.torch import load_file, save_file
from test_packed_base import NF4, dequantised, formats_of, on, same_runs, save_wide_base
from test_train_also import IN_FULL, NAMES

from lora_converter.titan.job import full_phase_result
from lora_converter.titan.phases import full_phase_config

WO_TOO = ("--lora.train_also=norm,layers.1.attention.wo,output", "--lora.exclude_modules=layers.1.attention.wo")


def on_hf(base: Path, *options: str) -> list[str]:
    # Adam's eps stands above the rounding of gradients near zero (see parity.py).
    return [
        f"--checkpoint.initial_load_path={base}",
        "--checkpoint.initial_load_in_hf",
        "--optimizer.eps=1e-5",
        *options,
    ]


def moved(run: Run, names: set[str]) -> set[str]:
    """Which of them the run has changed since its first step."""
    return {name for name in names if not torch.equal(run.begun[name], adapter_state(run)[name])}


def recorded(folder: Path, *options: str) -> Run:
    run = build(folder, *options)
    load = run.trainer.checkpointer.load
    run.trainer.checkpointer.load = lambda step=-1: (load(step), run.begun.update(adapter_state(run)))[0]
    finish(run)
    return run


def test_a_linear_that_trains_in_full_is_not_packed(tmp_path: Path) -> None:
    base = save_wide_base(tmp_path / "base")
    dense = dequantised(base, tmp_path / "dense")
    key = "model.layers.1.self_attn.o_proj.weight"
    weights = load_file(dense / "model.safetensors") | {key: load_file(base / "model.safetensors")[key]}
    save_file(weights, dense / "model.safetensors")
    packed = recorded(tmp_path / "packed", *on(base, NF4, *WO_TOO))
    same_runs(packed, train(tmp_path / "run", *on(dense, *WO_TOO)))
    assert formats_of(packed) == {"nf4"}
    names = {"norm.weight", "layers.1.attention.wo.weight", "output.weight"}
    assert moved(packed, names) == names


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++")
def test_compiled_it_is_the_same_run(hf_base: Path, tmp_path: Path) -> None:
    """Other orders of sums: as in the parity table, to 1e-4 of how far each weight has moved."""
    torch._dynamo.reset()  # it counts what other tests have compiled
    plain = recorded(tmp_path / "plain", *on_hf(hf_base, IN_FULL))
    compiled = train(tmp_path / "compiled", *on_hf(hf_base, IN_FULL, *COMPILE))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
    assert compiled.grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)
    theirs = adapter_state(plain)
    for name, value in adapter_state(compiled).items():
        moved_by = (theirs[name] - plain.begun[name]).abs().max()
        assert (value - theirs[name]).abs().max() < 1e-4 * moved_by, name


def test_under_full_activation_checkpointing_too(hf_base: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *on_hf(hf_base, IN_FULL))
    same_runs(train(tmp_path / "again", *on_hf(hf_base, IN_FULL, *FULL_AC)), plain)


def test_a_float8_linear_that_trains_in_full_is_torchaos(hf_base: Path, tmp_path: Path) -> None:
    """Emulated on CPU. Its weight is not frozen: torchao's own backward gives it a gradient."""
    float8 = ["--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate"]
    run = recorded(tmp_path, *on_hf(hf_base, *float8, *WO_TOO))
    names = {"norm.weight", "layers.1.attention.wo.weight", "output.weight"}
    assert moved(run, names) == names


def test_after_a_phase_of_all_weights(tmp_path: Path) -> None:
    start_process_group()
    phases = ["--checkpoint.initial_load_path=", "--lora.full_phase.steps=2", "--lora.full_phase.lr=1e-3", IN_FULL]
    config = parse(tmp_path, *phases)
    first = Trainer(full_phase_config(config))
    first.train()
    expected = {n: p.detach().clone() for n, p in first.model_parts[0].named_parameters() if n in NAMES}
    first.close()
    run = recorded(tmp_path, *phases, f"--checkpoint.initial_load_path={full_phase_result(config)}")
    assert all(torch.equal(run.begun[name], value) for name, value in expected.items())
    assert moved(run, NAMES) == NAMES
