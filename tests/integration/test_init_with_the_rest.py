"""`[lora] init` with what else a job may have, on one rank: it begins at the base, goes on, and is exported."""

from pathlib import Path

import pytest
import torch
from harness import adapter_state, build, finish, full_state, parse, start_process_group, train
from hf_tiny import tiny_llama
from peft import PeftModel
from qat_converter import WEIGHTS_ALONE
from test_training import FLOAT8

from lora_converter.titan.job import full_phase_result
from lora_converter.titan.phases import run_full_phase

PLAIN_OUTPUTS = {
    "compile": ["--compile.enable", "--compile.components=model", "--compile.backend=aot_eager"],
    "dropout": ["--lora.dropout=0.2"],
    "train_also": ["--lora.train_also=norm,layers.*.ffn_norm"],
    "full AC": ["--activation_checkpoint.mode=full"],
    "patterns": ["--lora.rank_pattern", "wq", "3", "--lora.alpha_pattern", "w2", "5.0"],
}
OTHER_OUTPUTS = {"float8": FLOAT8, "QAT": WEIGHTS_ALONE}
"""Of products that PEFT's plain linears have not."""


def on(base: Path) -> list[str]:
    source = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", "--checkpoint.interval=1"]
    return [*source, "--training.steps=2", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]


@pytest.mark.parametrize("name", [*PLAIN_OUTPUTS, *OTHER_OUTPUTS])
def test_a_job_begins_at_the_base_goes_on_and_is_exported(name: str, hf_base: Path, tmp_path: Path) -> None:
    more = (PLAIN_OUTPUTS | OTHER_OUTPUTS)[name]
    plain = train(tmp_path / "plain", *on(hf_base), *more, "--training.steps=1")
    options = [*on(hf_base), *more, "--lora.init=pissa"]
    run = build(tmp_path / "run", *options)
    run.trainer.checkpointer.load()
    before, adapters = full_state(run), set(adapter_state(run))
    finish(run)
    after = full_state(run)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in adapters if not key.endswith("0.weight")}
    assert run.losses[0] == plain.losses[0]
    again = train(tmp_path / "run", *options, "--checkpoint.load_step=1")
    assert again.losses == run.losses[1:]
    if name in PLAIN_OUTPUTS:
        inputs, model = run.batches[0][0], run.trainer.model_parts[0].eval()
        exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run" / "checkpoint" / "step-2")
        with torch.no_grad():
            torch.testing.assert_close(exported(inputs).logits, model(inputs), atol=2e-5, rtol=1e-5)


def test_a_step_starts_another_run_with_what_its_factors_began_at(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base)[:3], "--training.steps=2", "--lora.init=olora"]
    first = train(tmp_path / "first", *options)
    step = tmp_path / "first" / "checkpoint" / "step-2"
    other = build(tmp_path / "other", *options, f"--lora.initial_adapter_path={step}")
    other.trainer.checkpointer.load()
    expected, found = adapter_state(first), adapter_state(other)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    other.trainer.close()


def test_after_a_full_phase_the_factors_begin_at_its_result(tmp_path: Path) -> None:
    start_process_group()
    options = ["--lora.full_phase.steps=2", "--lora.full_phase.lr=1e-3", "--lora.init=pissa", "--lora.alpha=4"]
    config = parse(tmp_path, "--checkpoint.initial_load_path=", *options)
    run_full_phase(config)
    run = build(tmp_path, *options, f"--checkpoint.initial_load_path={full_phase_result(config)}")
    run.trainer.checkpointer.load()
    weights = dict(run.trainer.model_parts[0].named_parameters())
    fqn = "layers.1.feed_forward.w2"
    u, s, vh = torch.linalg.svd(weights[f"{fqn}.weight"].detach(), full_matrices=False)
    begun = weights[f"{fqn}.lora_b0.weight"] @ weights[f"{fqn}.lora_a0.weight"]
    torch.testing.assert_close(begun.detach(), u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-5)
    run.trainer.close()
