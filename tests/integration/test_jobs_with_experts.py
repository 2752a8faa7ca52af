"""Jobs whose adapters are on routed experts: what trains, what is counted, what is refused and when."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BASE_CONFIG, build, finish, parse, train
from tiny_models import MODELS
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter.adapted import adapted_modules
from lora_converter.titan.converter import LoRAConverter
from lora_converter.titan.models import built_on_meta
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


def convert(config: Any) -> None:
    spec, degrees = get_train_spec(config.model.name), config.parallelism
    tp, ep, etp = (getattr(degrees, f"{of}_parallel_degree") for of in ("tensor", "expert", "expert_tensor"))
    dims = ParallelDims(dp_replicate=1, dp_shard=4 // tp, cp=1, tp=tp, pp=1, ep=ep, etp=etp, world_size=4)
    LoRAConverter(config, dims).convert(built_on_meta(spec, spec.model_args[config.model.flavor], config))


@pytest.mark.parametrize("targets", ["all-linear", "experts"])
@pytest.mark.parametrize("start", [convert, _check_targets], ids=["job", "first phase"])
def test_gpt_oss_is_refused_where_torchtitan_adds_a_bias_twice(tmp_path: Path, start: Any, targets: str) -> None:
    """tests/unit/test_gpt_oss_experts.py has torchtitan's sum, tests/distributed/parity.py trains what is left."""

    def begin(model: str, *layout: str) -> None:
        degrees = [f"--parallelism.{of}_parallel_degree=2" for of in layout]
        options = ["--checkpoint.initial_load_path=", f"--lora.target_modules={targets}"]
        start(parse(tmp_path, *MODELS[model], *options, *degrees))

    both = ("expert", "tensor", "expert_tensor")
    says = r"adds a bias of gpt_oss's experts 2 times there, .* Leave out expert or tensor parallelism\."
    with pytest.raises(ValueError, match=f"parallelism.expert_tensor_parallel_degree = 2: .* {says}"):
        begin("gpt_oss", *both)
    begin("gpt_oss", "expert")
    begin("gpt_oss", "tensor")
    begin("deepseek_v3", *both)


def test_a_step_is_continued_by_the_same_experts_alone(tmp_path: Path) -> None:
    base = [*DEEPSEEK, "--checkpoint.interval=2"]
    whole = train(tmp_path / "whole", *base, EXPERTS, "--training.steps=4")
    train(tmp_path / "run", *base, EXPERTS, "--training.steps=2", "--lr_scheduler.total_steps=4")
    for other, message in {
        "--lora.target_modules=all-linear": r"12 entries are there alone: layers.1.moe.experts.w1_lora_a",
        "--lora.expert_rank=2": r"lora.rank of layers.1.moe.experts is 4 there and 2 here; of layers.2.moe.experts is",
        "--lora.target_modules=all-linear,*.experts.w1": r"8 entries are there alone: layers.1.moe.experts.w2_lora_a",
    }.items():
        run = build(tmp_path / "run", *base, EXPERTS, "--training.steps=4", other)
        with pytest.raises(ValueError, match=message):
            run.trainer.checkpointer.load()
        run.trainer.close()
    same = ["--lora.expert_rank=5", "--lora.rank_pattern", "experts", "4"]  # said in another way
    second = train(tmp_path / "run", *base, EXPERTS, "--training.steps=4", *same)
    assert second.losses == whole.losses[2:]


def test_the_log_has_the_rank_of_what_is_adapted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    job = [*DEEPSEEK, "--checkpoint.no-enable", "--lora.expert_rank=3"]
    build(tmp_path, *job, "--lora.target_modules=experts").trainer.close()
    assert "LoRA: 2 experts modules adapted (rank 3, alpha 32), " in caplog.text
    build(tmp_path, *job).trainer.close()
    assert "LoRA: lora.expert_rank = 3 has no effect: no experts are adapted." in caplog.text


def test_a_step_with_fewer_products_is_refused(tmp_path: Path) -> None:
    base = [*DEEPSEEK, "--checkpoint.interval=2"]
    train(tmp_path, *base, "--lora.target_modules=*.experts.w1", "--training.steps=2")
    run = build(tmp_path, *base, "--lora.target_modules=experts", "--training.steps=4")
    with pytest.raises(ValueError, match=r"layers.1.moe.experts.w2_lora_a"):
        run.trainer.checkpointer.load()
    run.trainer.close()
