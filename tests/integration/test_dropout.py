"""Dropout's mask in the backward is that of the forward, in eager and compiled, with every kind of recomputation."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from derivative import relative_error
from harness import build, train
from parity import COMPILE, FULL_AC, LAYER_SAC, OP_SAC, ROWS, TOKENS, feed_global_batches, fill_b

from lora_converter import LoRAConfig, apply_lora, disable_adapter

HALF = ["--lora.dropout=0.5"]
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++"
)
AC = {"no": [], "full": FULL_AC, "op": OP_SAC, "layer": LAYER_SAC}
MODES = {f"eager, {name} AC": options for name, options in AC.items()} | {
    f"compiled, {name} AC": [*COMPILE, *AC[name]] for name in ("no", "full", "op")
}


def on(base: Path) -> list[str]:
    sizes = [
        f"--training.global_batch_size={ROWS}",
        f"--training.local_batch_size={ROWS}",
        f"--training.seq_len={TOKENS}",
    ]
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *sizes]


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=(NEEDS_COMPILER, pytest.mark.slow) if "compiled" in m else ()) for m in MODES]
)
def test_gradients_are_those_of_the_loss(mode: str, hf_base: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    run = build(tmp_path, *on(hf_base), *HALF, *MODES[mode])
    run.trainer.checkpointer.load()
    fill_b(run)
    feed_global_batches(run)
    # The loss rounds to 5e-7, over 2 eps that is 1e-3 of the derivative; its third derivative is 2e-3 of it.
    assert relative_error(run) < 5e-3
    run.trainer.close()


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_every_adapter_trains(hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """20 of 28 got no gradient, where Inductor's CPU code ran products before their mask was there."""
    torch._dynamo.reset()
    run = train(tmp_path, *on(hf_base), "--lora.dropout=0.05", *COMPILE, "--checkpoint.interval=2")
    assert "got no gradient" not in caplog.text and "are still zero" not in caplog.text
    assert len(run.losses) == 3


@NEEDS_COMPILER
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_an_update_after_a_norm_is_there(bias: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64, bias=bias)).train()
    apply_lora(model, LoRAConfig(rank=4, alpha=8.0, dropout=0.05))
    nn.init.normal_(model[1].lora_b.weight)
    x = torch.randn(4, 32, 64)
    eager = model(x)
    with disable_adapter(model):
        base = model(x)
    model.compile()
    ratio = (model(x) - base).norm() / (eager - base).norm()
    assert 0.9 < ratio < 1.1  # other masks


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_that_draws_again_is_refused(mode: str, hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), f"--activation_checkpoint.mode={mode}", "--activation_checkpoint.no-preserve_rng_state"]
    with pytest.raises(ValueError) as error:
        build(tmp_path, *options, *HALF)
    assert str(error.value) == (
        f"lora.dropout = 0.5 with activation_checkpoint.mode = '{mode}' and activation_checkpoint.preserve_rng_state = "
        "false: what is recomputed would draw other masks than the forward had. Set preserve_rng_state = true."
    )
    build(tmp_path, *options).trainer.close()
