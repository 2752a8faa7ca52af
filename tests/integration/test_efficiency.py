"""What torchtitan's own run with adapters spends: float8 products, casts of weights, FLOPs counted, conversion."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from harness import BASE_CONFIG, ROOT, build
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from lora_converter import LoRAConfig, apply_lora, merge_adapter, unmerge_adapter
from lora_converter.tensor_parallel import LoRAFactor
from lora_converter.titan.float8 import FrozenFloat8Linear, freeze_float8_linears

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Calls(TorchDispatchMode):
    """Products of float8 operands, and casts of a whole weight to float8."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.products += func is torch.ops.aten.mm.default and isinstance(args[0], Float8TrainingTensor)
        return func(*args, **(kwargs or {}))


def float8_pair(recipe: str, *, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """torchao's linear with a frozen weight, and the same swapped for ours."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias=bias).requires_grad_(False)
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    pair = [nn.Sequential(Float8Linear.from_float(linear, config)) for _ in range(2)]
    freeze_float8_linears(pair[1])
    assert type(pair[0][0]) is Float8Linear and isinstance(pair[1][0], FrozenFloat8Linear)
    return pair[0], pair[1]


@contextmanager
def weight_casts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    from lora_converter.titan import float8

    cast, shapes = float8._to_float8, []

    def count(tensor: torch.Tensor, operand: str, *args: Any) -> torch.Tensor:
        if operand.startswith("weight"):
            shapes.append(tensor.shape)
        return cast(tensor, operand, *args)

    monkeypatch.setattr(float8, "_to_float8", count)
    yield shapes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_frozen_float8_linear_gives_torchaos_numbers_with_one_product_backward(
    recipe: str, keeps: bool, bias: bool
) -> None:
    theirs, ours = float8_pair(recipe, bias=bias)
    ours[0].keeps_cast_weight = keeps
    x, dy = torch.randn(2, 16, 32), torch.randn(2, 16, 48)
    found, products = [], []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        with Calls() as calls:
            out.backward(dy)
        found.append((out, leaf.grad))
        products.append(calls.products)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert products[1] == 1 and products[0] + (recipe == "rowwise_with_gw_hp") == 2


def test_a_frozen_float8_linear_keeps_nothing_of_its_input() -> None:
    kept = []
    for module in float8_pair("tensorwise"):
        x, shapes = torch.randn(16, 32, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            module(x)
        kept.append(shapes)
    assert (16, 32) in kept[0] and kept[1] == [(32, 48)]


def test_its_weight_is_cast_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = float8_pair("tensorwise")
    apply_lora(model, LoRAConfig(rank=2))
    nn.init.normal_(model[0].lora_b.weight)
    model[0].keeps_cast_weight = True
    x = torch.randn(4, 32, requires_grad=True)
    with weight_casts(monkeypatch) as casts:
        for _ in range(3):
            model(x).sum().backward()
        assert len(casts) == 1  # for the forward and for the gradient of the input
        before = model(x)
        merge_adapter(model)
        merged = model(x)
        unmerge_adapter(model)
        assert torch.equal(model(x), before) and len(casts) == 3
    assert (merged - before).abs().max() < 0.2 * before.abs().max() and not torch.equal(merged, before)


def test_float8_weights_are_cast_once_over_a_whole_run(hf_base: Path, tmp_path: Path, monkeypatch) -> None:
    base = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    options = ["--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate"]
    with weight_casts(monkeypatch) as casts:
        run = build(tmp_path, *base, *options)
        run.trainer.train()
        run.trainer.close()
    frozen = sum(isinstance(module, FrozenFloat8Linear) for module in run.trainer.model_parts[0].modules())
    assert frozen >= 28 and len(casts) == frozen


class WeightCasts(TorchDispatchMode):
    """Shapes of two-dimensional tensors that are converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].ndim == 2:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_autocast_recasts_no_frozen_weight(hf_base: Path, tmp_path: Path) -> None:
    """One rank, bf16: what is cast are the factors alone. A run of all weights casts them all."""
    base = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    cast = []
    for name, config in (("lora", {}), ("full", {"config": BASE_CONFIG})):
        run = build(tmp_path / name, *base, "--training.mixed_precision_param=bfloat16", **config)
        model = run.trainer.model_parts[0]
        with run.trainer.train_context(), run.trainer.maybe_enable_amp, WeightCasts() as casts:
            model(torch.randint(0, 320, (2, 64))).float().sum().backward()
        weights = {tuple(m.weight.shape) for m in model.modules() if is_linear(m)}
        cast.append(casts.shapes & weights)
        run.trainer.close()
    assert cast[0] == set() and len(cast[1]) >= 4


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, LoRAFactor)


@pytest.mark.parametrize("model", [[], ["--model.name=deepseek_v3", "--model.flavor=debugmodel"]], ids=["dense", "moe"])
def test_frozen_parameters_count_4_flops_per_token_and_not_6(model: list[str], tmp_path: Path) -> None:
    """By hand: 6 for the adapters; 4 for the rest but the embedding, routed experts as far as they are active."""
    options = ["--checkpoint.no-enable", "--checkpoint.initial_load_path=", *model]
    flops = []
    for config in ({"config": BASE_CONFIG}, {}):
        run = build(tmp_path, *options, **config)
        flops.append(run.trainer.metrics_processor.num_flops_per_token)
        run.trainer.close()
    trained, active = 0, 0.0
    args = run.trainer.model_args
    for name, param in run.trainer.model_parts[0].named_parameters():
        if param.requires_grad:
            trained += param.numel()
        elif "tok_embeddings" not in name:
            active += param.numel() * (args.moe_args.top_k / args.moe_args.num_experts if "moe.experts" in name else 1)
    attention = flops[0] - 6 * active
    assert flops[1] == pytest.approx(attention + 6 * trained + 4 * active, rel=1e-9)


META = """
import resource, sys, time
sys.path.insert(0, "tests")
import harness
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, llama3_args
from lora_converter.titan.converter import LoRAConverter
import torch

config = harness.parse("/unused", "--model.flavor=405B", "--checkpoint.initial_load_path=", "--checkpoint.no-enable")
with torch.device("meta"):
    model = Transformer(llama3_args["405B"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
LoRAConverter(config, dims).convert(model)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(list(model.modules())))
"""


@pytest.mark.alone
def test_llama_3_405b_is_converted_on_meta_in_5_seconds_and_2_gb() -> None:
    result = subprocess.run([sys.executable, "-c", META], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, kib, modules = map(float, result.stdout.split()[-3:])
    assert modules > 126 * 14 and seconds < 5 and kib * 1024 < 2e9
