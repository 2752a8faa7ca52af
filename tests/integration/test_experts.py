"""Jobs whose adapters are on routed experts: what trains, what is counted, what is refused and when."""

import logging
from pathlib import Path

import pytest
import torch
from harness import BASE_CONFIG, build, finish, train
from tiny_models import MODELS

from lora_converter.adapted import adapted_modules
from lora_converter.titan.phases import _check_targets

EXPERTS = "--lora.target_modules=all-linear,experts"
DEEPSEEK = ["--model.name=deepseek_v3", "--checkpoint.initial_load_path="]


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("deepseek_v3", "24 linears and 2 experts modules"),
        ("qwen3_moe", "12 linears and 3 experts modules"),
        ("llama4", "28 linears and 2 experts modules"),
        ("gpt_oss", "8 linears and 2 experts modules"),
    ],
)
def test_experts_train_and_routing_and_base_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, counts: str
) -> None:
    caplog.set_level(logging.INFO)
    options = [*MODELS[model], "--checkpoint.initial_load_path=", "--checkpoint.no-enable", EXPERTS]
    run = build(tmp_path, *options, "--lora.expert_rank=3")
    assert f"LoRA: {counts} adapted (rank 4 and 3, alpha 32), " in caplog.text
    before = {name: value.clone() for name, value in run.trainer.model_parts[0].state_dict().items()}
    finish(run)
    after = run.trainer.model_parts[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = list(adapted_modules(run.trainer.model_parts[0]))
    assert changed == {f"{module.lora_fqn}.{name}" for module in adapted for name in module.adapter_parameters()}
    assert len({name.rpartition(".")[0] for name in changed if ".experts." in name}) == int(counts.split()[3])


def test_experts_are_counted_as_far_as_they_are_active(tmp_path: Path) -> None:
    """FLOPs by hand: 6 for adapters and 4 for the frozen rest but the embedding; half of the experts are active."""
    flops = []
    for config in ({"config": BASE_CONFIG}, {}):
        run = build(tmp_path, *DEEPSEEK, "--checkpoint.no-enable", *([EXPERTS] if not config else []), **config)
        flops.append(run.trainer.metrics_processor.num_flops_per_token)
        run.trainer.close()
    trained, frozen = 0.0, 0.0
    for name, param in run.trainer.model_parts[0].named_parameters():
        active = param.numel() * (0.5 if "moe.experts" in name else 1)
        trained += active if param.requires_grad else 0
        frozen += active if not param.requires_grad and "tok_embeddings" not in name else 0
    attention = flops[0] - 6 * frozen
    assert flops[1] == pytest.approx(attention + 6 * trained + 4 * frozen, rel=1e-9)


def test_dropout_is_refused_before_the_training_and_before_a_first_phase(tmp_path: Path) -> None:
    options = [*DEEPSEEK, EXPERTS, "--lora.dropout=0.1"]
    says = r"^deepseek_v3/tiny: lora.dropout = 0.1: adapters on routed experts have none, .* Set it to 0, or "
    with pytest.raises(ValueError, match=f"{says}take experts out of lora.target_modules"):
        build(tmp_path, *options)
    build(tmp_path, *options, "--lora.target_modules=all-linear", "--checkpoint.no-enable").trainer.close()
    run = build(tmp_path, *DEEPSEEK, EXPERTS, "--checkpoint.no-enable")
    run.trainer.close()
    run.trainer.job_config.lora.dropout = 0.1
    with pytest.raises(ValueError, match=r"adapters on routed experts have none"):
        _check_targets(run.trainer.job_config)


def test_a_step_is_continued_by_the_same_experts_alone(tmp_path: Path) -> None:
    base = [*DEEPSEEK, "--checkpoint.interval=2"]
    whole = train(tmp_path / "whole", *base, EXPERTS, "--training.steps=4")
    train(tmp_path / "run", *base, EXPERTS, "--training.steps=2", "--lr_scheduler.total_steps=4")
    for other, message in {
        "--lora.target_modules=all-linear": r"12 entries are there alone: layers.1.moe.experts.w1_lora_a",
        "--lora.expert_rank=2": r"lora.expert_rank is 0 there and 2 here",
        "--lora.target_modules=all-linear,*.experts.w1": r"8 entries are there alone: layers.1.moe.experts.w2_lora_a",
    }.items():
        run = build(tmp_path / "run", *base, EXPERTS, "--training.steps=4", other)
        with pytest.raises(ValueError, match=message):
            run.trainer.checkpointer.load()
        run.trainer.close()
    second = train(tmp_path / "run", *base, EXPERTS, "--training.steps=4")
    assert second.losses == whole.losses[2:]


def test_a_step_with_fewer_products_is_refused(tmp_path: Path) -> None:
    base = [*DEEPSEEK, "--checkpoint.interval=2"]
    train(tmp_path, *base, "--lora.target_modules=*.experts.w1", "--training.steps=2")
    run = build(tmp_path, *base, "--lora.target_modules=experts", "--training.steps=4")
    with pytest.raises(ValueError, match=r"layers.1.moe.experts.w2_lora_a"):
        run.trainer.checkpointer.load()
    run.trainer.close()
