"""Adapters train in fp32 whatever the model is in, and steps of older versions resume."""

import shutil
from pathlib import Path

import torch
from harness import adapter_state, build, finish, train
from test_foreign_folders import on


def test_adapters_train_in_fp32_where_the_model_is_in_bf16(hf_base: Path, tmp_path: Path) -> None:
    options = [
        *on(hf_base),
        "--training.dtype=bfloat16",
        "--training.mixed_precision_param=bfloat16",
        "--optimizer.lr=2e-5",
    ]
    run = build(tmp_path, *options, "--checkpoint.interval=2")
    before = {name: value for name, value in adapter_state(run).items() if "lora_a" in name}
    finish(run)
    after = adapter_state(run)
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] != value).flatten() for name, value in before.items()]).float().mean()
    assert moved > 0.9  # in bf16 5 to 9 %
    states = run.trainer.optimizers.optimizers[0].state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


def test_steps_that_older_versions_saved_in_bf16_still_resume(hf_base: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run = train(tmp_path, *on(hf_base), "--training.steps=2", "--checkpoint.interval=2")
    step = tmp_path / "checkpoint" / "step-2"
    kept = (step / "lora.json").read_bytes()
    states = run.trainer.checkpointer.run.host.states
    adapters = {name: value.bfloat16() for name, value in adapter_state(run).items()}
    optimizer = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in states["optimizer"].state_dict().items()
    }
    shutil.rmtree(step)
    dcp.save({**states, "optimizer": optimizer, **adapters}, checkpoint_id=step)
    (step / "lora.json").write_bytes(kept)
    again = build(tmp_path, *on(hf_base), "--training.steps=3")
    finish(again)
    assert len(again.losses) == 1 and {v.dtype for v in adapter_state(again).values()} == {torch.float32}


# Adapters that bring more than factors, or other names
