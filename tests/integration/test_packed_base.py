"""A run on a packed base, against the same run on the base that bitsandbytes' own NF4 makes of it."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from harness import Run, adapter_state, train
from hf_models import save_tiny_llama
from safetensors.torch import load_file, save_file
from tiny_models import WIDE, WIDE_LLAMA

NF4 = "--lora.base_format=nf4"


def options(base: Path) -> tuple[str, ...]:
    return (*WIDE, f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide"), **WIDE_LLAMA)


@pytest.fixture(scope="module")
def dequantised(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, its linears rounded to bf16 and through bitsandbytes' NF4."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("dequantised"), **WIDE_LLAMA)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if value.ndim == 2 and "embed" not in name and "lm_head" not in name:
            codes, state = bnb.quantize_4bit(value.bfloat16(), blocksize=64, quant_type="nf4")
            state.dtype = torch.float32
            weights[name] = bnb.dequantize_4bit(codes, state)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("run"), *options(base), NF4)


def test_the_run_is_that_on_the_dequantised_base(run: Run, dequantised: Path, tmp_path: Path) -> None:
    """torchtitan's autocast computes in bf16 on one rank: W is rounded to it either way."""
    expected = train(tmp_path, *options(dequantised))
    assert run.losses == pytest.approx(expected.losses, rel=1e-6)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6)
    theirs = adapter_state(expected)
    for name, value in adapter_state(run).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)
