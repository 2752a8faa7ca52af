"""One rank, torchtitan's trainer, the tiny model: what trains, what does not, and from where it starts."""

import copy
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BASE_CONFIG, CONFIG, Run, adapter_state, build, finish, full_state, parse, train
from hf_tiny import tiny_llama
from torch._dynamo.utils import counters
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args

from lora_converter import LoRALinear, adapter_parameters
from lora_converter.adapted import adapted_modules
from lora_converter.tensor_parallel import LoRAFactor
from lora_converter.titan.converter import LoRAConverter

FLOAT8 = ["--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate"]


def from_hf(path: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={path}", "--checkpoint.initial_load_in_hf"]


def logits(run: Run, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run.trainer.model_parts[0](tokens)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))


def loaded(tmp_path: Path, *args: str, config: Path | None = None) -> Run:
    """A trainer with its checkpoint loaded, before the first step."""
    run = build(tmp_path, *args, **({"config": config} if config else {}))
    run.trainer.checkpointer.load()
    return run


def test_before_training_the_output_is_the_bases_bit_for_bit(hf_base: Path, tmp_path: Path, tokens) -> None:
    lora = loaded(tmp_path / "lora", *from_hf(hf_base))
    base = loaded(tmp_path / "base", *from_hf(hf_base), config=BASE_CONFIG)
    assert not any(isinstance(m, LoRALinear) for m in base.trainer.model_parts[0].modules())
    assert torch.equal(logits(lora, tokens), logits(base, tokens))


def test_the_base_from_hugging_face_is_transformers_model(hf_base: Path, tmp_path: Path, tokens) -> None:
    run = loaded(tmp_path, *from_hf(hf_base))
    with torch.no_grad():
        expected = tiny_llama()(input_ids=tokens).logits
    # fp32 with another attention kernel and another order of RoPE's rows.
    torch.testing.assert_close(logits(run, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_dcp_base_and_a_hugging_face_base_are_the_same_base(hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    hf = loaded(tmp_path / "hf", *from_hf(hf_base))
    dcp = loaded(tmp_path / "dcp", f"--checkpoint.initial_load_path={dcp_base}")
    first, second = full_state(hf), full_state(dcp)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("converters", [[], FLOAT8], ids=["plain", "float8"])
def test_training_moves_the_adapters_and_nothing_else(hf_base: Path, tmp_path: Path, converters: list[str]) -> None:
    run = build(tmp_path, *from_hf(hf_base), *converters)
    model = run.trainer.model_parts[0]
    optimizer = run.trainer.optimizers.optimizers[0]
    run.trainer.checkpointer.load()
    before = full_state(run)
    gradients: set[str] = set()
    step = optimizer.step

    def look_at_gradients(*args, **kwargs):
        gradients.update(name for name, param in model.named_parameters() if param.grad is not None)
        return step(*args, **kwargs)

    optimizer.step = look_at_gradients
    finish(run)

    after = full_state(run)
    adapters = adapter_parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(adapters) == 2 * 28
    assert changed == set(adapters) == gradients
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters)
    assert set(optimizer.state) == set(adapters.values())


def test_adapters_on_a_float8_base_are_not_quantized(hf_base: Path, tmp_path: Path) -> None:
    from torchao.float8.float8_linear import Float8Linear

    run = build(tmp_path, *from_hf(hf_base), *FLOAT8)
    linears = list(adapted_modules(run.trainer.model_parts[0]))
    assert len(linears) == 28 and all(isinstance(linear, Float8Linear) for linear in linears)
    factors = [factor for linear in linears for factor in (linear.lora_a, linear.lora_b)]
    assert not any(isinstance(factor, Float8Linear) for factor in factors)
    run.trainer.close()


def test_bare_parameters_norms_and_embeddings_are_frozen(hf_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *from_hf(hf_base))
    model = run.trainer.model_parts[0]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"tok_embeddings.weight", "norm.weight", "layers.0.attention_norm.weight", "output.weight"} <= frozen
    run.trainer.close()


def test_a_deep_copied_model_initialises_itself_and_not_the_original(tmp_path: Path) -> None:
    """What a pipeline stage is: a deep copy of the converted meta model, materialised later."""
    with torch.device("meta"):
        model = Transformer(llama3_args["tiny"])
    one_rank = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    LoRAConverter(parse(tmp_path, "--checkpoint.initial_load_path="), one_rank).convert(model)
    stage = copy.deepcopy(model)
    stage.to_empty(device="cpu")
    with torch.no_grad():
        for param in stage.parameters():
            param.fill_(torch.nan)
        stage.init_weights()
    assert all(param.is_meta for param in model.parameters())
    assert all(torch.isfinite(param).all() for param in stage.parameters())


@pytest.mark.parametrize("flavor", ["tied", "untied"])
def test_one_rank_stores_frozen_linears_in_bf16_and_computes_what_autocast_computed(
    flavor: str, tmp_path: Path
) -> None:
    """A weight that a tied output head shares with the embedding stays as it is: autocast rounds no embedding."""
    tied = flavor == "tied"
    qwen3_args[flavor] = Qwen3ModelArgs(
        vocab_size=320, head_dim=24, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, qk_norm=True, hidden_dim=160,
        enable_weight_tying=tied,
    )  # fmt: skip
    options = ["--model.name=qwen3", f"--model.flavor={flavor}", "--training.mixed_precision_param=bfloat16"]
    seed = build(tmp_path / "seed", *options, "--checkpoint.create_seed_checkpoint", config=BASE_CONFIG)
    seed.trainer.checkpointer.save(curr_step=0, last_step=True)
    seed.trainer.close()
    source = f"--checkpoint.initial_load_path={tmp_path}/seed/checkpoint/step-0"
    first_losses = []
    over_logits = "--lora.loss_chunk_tokens=0"  # as of the base: in chunks it is another order of one sum
    for name, config, loss in (("lora", CONFIG, [over_logits]), ("base", BASE_CONFIG, [])):
        run = build(tmp_path / name, *options, source, "--training.steps=1", *loss, config=config)
        if name == "lora":
            model = run.trainer.model_parts[0]
            stored = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
            modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            linears = {f"{n}.weight" for n, m in modules.items() if not isinstance(m, LoRAFactor)}
            assert stored == linears - ({"output.weight"} if tied else set())
        finish(run)
        first_losses += run.losses
    assert first_losses[0] == first_losses[1]


def test_adapters_of_another_run_are_where_training_starts(hf_base: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", *from_hf(hf_base))
    path = tmp_path / "first" / "checkpoint" / "step-3"
    second = loaded(tmp_path / "second", *from_hf(hf_base), f"--lora.initial_adapter_path={path}")
    trained, started = adapter_state(first), adapter_state(second)
    assert all(torch.equal(trained[name], started[name]) for name in trained)
    assert second.trainer.step == 0
    second.trainer.close()


def test_quantization_converters_are_what_the_order_check_takes_them_for() -> None:
    from torchtitan.protocols.model_converter import _registry_model_converter_cls as registry

    assert {name for name, cls in registry.items() if issubclass(cls, QuantizationConverter)} == {
        "quantize.linear.float8",
        "quantize.linear.mx",
        "quantize.grouped_mm.float8",
        "quantize.grouped_mm.mx",
    }


@pytest.mark.parametrize(
    ("model", "flavor", "adapted"),
    [("deepseek_v3", "debugmodel", 42), ("qwen3", "debugmodel_moe", 32), ("llama4", "debugmodel", 42)],
)
def test_moe_debug_models_train_on_cpu_with_their_routing_frozen(
    tmp_path: Path, model: str, flavor: str, adapted: int
) -> None:
    options = [f"--model.name={model}", f"--model.flavor={flavor}", "--checkpoint.initial_load_path="]
    run = build(tmp_path, *options, "--training.steps=2", "--training.local_batch_size=1", "--checkpoint.no-enable")
    names = [linear.lora_fqn for linear in adapted_modules(run.trainer.model_parts[0])]
    assert not any("router" in name or name == "output" for name in names)
    before = {name: value.clone() for name, value in run.trainer.model_parts[0].state_dict().items()}
    finish(run)
    after = run.trainer.model_parts[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.lora_{factor}.weight" for name in names for factor in "ab"}
    assert len(names) == adapted


@pytest.mark.alone
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++")
def test_compiled_blocks_are_one_graph_without_breaks_or_recompiles(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One graph serves all blocks but the first, whose input has no gradient: the embedding below it is frozen.

    What the log says of the first step is what it took longer than the others, by a clock.
    """
    caplog.set_level("INFO")
    eager = train(tmp_path / "eager", *from_hf(hf_base))
    assert first_steps(caplog) == []
    graphs = {}
    for name, config in (("lora", CONFIG), ("base", BASE_CONFIG)):
        torch._dynamo.reset()
        counters.clear()
        run = build(tmp_path / name, *from_hf(hf_base), "--compile.enable", "--compile.components=model", config=config)
        steps, seconds = graphs.setdefault(name, []), []
        train_step = run.trainer.train_step

        def step(data: Any, train_step: Any = train_step, steps: Any = steps, seconds: Any = seconds) -> None:
            start = time.perf_counter()
            train_step(data)
            seconds.append(time.perf_counter() - start)
            steps.append(counters["stats"]["unique_graphs"])

        run.trainer.train_step = step
        finish(run)
        assert not counters["graph_break"], counters["graph_break"]
        if name == "lora":
            [(took, compiled)] = first_steps(caplog)
            assert abs(took - seconds[0]) < 0.2  # rounded to 0.1
            # 0.95 to 1.0 of it; the rest is what is imported for the compiler, and other work on the machine.
            assert 0.7 * (seconds[0] - min(seconds[1:])) - 0.1 <= compiled <= took
            # fp32 with other kernels.
            torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(eager.losses), rtol=1e-5, atol=0)
    assert graphs == {"lora": [2, 2, 2], "base": [1, 1, 1]}
    assert len(first_steps(caplog)) == 1  # a job without adapters has torchtitan's log


def test_each_launch_that_compiles_says_what_its_own_first_step_took(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a resumed run too. Both are in one process here, and the second finds its graphs made."""
    caplog.set_level("INFO")
    options = ["--compile.enable", "--compile.components=model", "--compile.backend=eager", "--checkpoint.interval=2"]
    torch._dynamo.reset()
    for launch, steps in enumerate((2, 4), start=1):
        run = train(
            tmp_path, *from_hf(hf_base), *options, f"--training.steps={steps}", "--checkpoint.no-last_save_model_only"
        )
        assert len(run.losses) == 2
        assert len(first_steps(caplog)) == launch
    assert "LoRA: resuming from" in caplog.text
    assert first_steps(caplog)[0][1] > 0
    assert all(compiled <= took for took, compiled in first_steps(caplog))


def first_steps(caplog: pytest.LogCaptureFixture) -> list[tuple[float, float]]:
    """Seconds of first steps, and of torch.compile in them, as the log has them."""
    line = r"LoRA: the first step took (.+) s, torch.compile (.+) s of it on this rank\."
    found = [re.fullmatch(line, record.getMessage()) for record in caplog.records]
    return [(float(match[1]), float(match[2])) for match in found if match]
