"""Adapters on linears of quantization-aware training, against torchao's own modules and plain torch."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    unload_adapter,
    unmerge_adapter,
)

INT4 = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(32)}
DEPLOYED = {
    "int4 weights": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int8 inputs, int4 weights": Int8DynamicActivationIntxWeightConfig(**INT4),
}
"""What the model is to become."""

FAKED: dict[str, dict[str, Any]] = {
    "int4 weights": {"weight_config": IntxFakeQuantizeConfig(torch.int4, group_size=32)},
    "int8 inputs, int4 weights": {
        "weight_config": IntxFakeQuantizeConfig(torch.int4, group_size=32),
        "activation_config": IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
    },
}
every_scheme = pytest.mark.parametrize("scheme", FAKED)

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
CONFIG = LoRAConfig(rank=4, alpha=8.0)


def fake_quantized(scheme: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64, bias=False))
    quantize_(model, QATConfig(**FAKED[scheme], step="prepare"))
    assert type(model[0]) is type(model[2]) is FakeQuantizedLinear
    return model


def train(model: nn.Module, steps: int = 20) -> None:
    """Towards a target that the base is far from, so that what is added is as large as what is rounded off."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    target = torch.randn(X.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        F.mse_loss(model(X), target).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapter_parameters(model))
        optimizer.step()
        optimizer.zero_grad()


def in_plain_torch(model: nn.Module, base: nn.Sequential) -> torch.Tensor:
    """torchao's linears and, beside each, the update of its own input, which is not rounded."""
    x, factors = X, adapter_parameters(model)
    for name, module in base.named_children():
        out = module(x)
        if f"{name}.lora_a.weight" in factors:
            a, b = factors[f"{name}.lora_a.weight"], factors[f"{name}.lora_b.weight"]
            out = out + 2.0 * (x @ a.t()) @ b.t()
        x = out
    return x


@every_scheme
def test_an_adapter_is_beside_the_fake_quantized_linear(scheme: str) -> None:
    model, base = fake_quantized(scheme), fake_quantized(scheme)
    apply_lora(model, CONFIG)
    assert torch.equal(model(X), base(X))  # B is zero
    train(model)
    expected = in_plain_torch(model, base)
    assert (expected - base(X)).norm() > 0.5 * base(X).norm()
    # fp32, another order. A rounding of activations could flip on that; with this seed none does.
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    with disable_adapter(model):
        assert torch.equal(model(X), base(X))
    before = base.state_dict()
    assert model.state_dict().keys() == before.keys() | adapter_parameters(model).keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_compiled_code_computes_the_same() -> None:
    model = fake_quantized("int8 inputs, int4 weights")
    apply_lora(model, CONFIG)
    train(model, steps=1)
    expected, compiled = model(X), torch.compile(model, fullgraph=True, backend="eager")
    # fp32, another order.
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)


@every_scheme
def test_merging_rounds_the_update_with_the_weight(scheme: str) -> None:
    """And so gives the outputs of another model: what docs/library.md says, with the figures there."""
    model, base = fake_quantized(scheme), fake_quantized(scheme)
    apply_lora(model, CONFIG)
    train(model)
    trained, before = model(X), {name: value.clone() for name, value in model.state_dict().items()}
    sums = copy.deepcopy(base)
    for linear, merged in zip((sums[0], sums[2]), (model[0], model[2]), strict=True):
        linear.weight.data += 2.0 * (merged.lora_b.weight @ merged.lora_a.weight).detach()
    merge_adapter(model)
    merged = model(X)
    # fp32 products in another order move a weight across a bound of int4 rarely, and with this seed never.
    torch.testing.assert_close(merged, sums(X), rtol=1e-5, atol=1e-5)
    off = ((merged - trained).norm() / trained.norm()).item()
    assert off == pytest.approx(0.1, abs=0.02)
    unmerge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), trained)
    assert torch.equal(merge_and_unload(model)(X), merged) and type(model[0]) is FakeQuantizedLinear


@every_scheme
def test_a_model_is_converted_without_its_adapter_which_then_goes_beside_the_quantized_weights(scheme: str) -> None:
    model = fake_quantized(scheme)
    apply_lora(model, CONFIG)
    train(model)
    trained, convert = model(X), QATConfig(DEPLOYED[scheme], step="convert")
    says = (
        "0 has an adapter, which a conversion would lose. Take it off with unload_adapter, and put it on the converted "
        "model again, or call merge_and_unload."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        quantize_(model, convert)
    assert torch.equal(model(X), trained)

    state = adapter_state_dict(model)
    quantize_(unload_adapter(model), convert)
    assert type(model[0]) is nn.Linear and type(model[0].weight) is not nn.Parameter
    apply_lora(model, CONFIG)
    load_adapter_state_dict(model, state)
    # int8 inputs: torchao's quantized linear rounds as the fake one, but for ties, and multiplies in another order.
    torch.testing.assert_close(model(X), trained, rtol=1e-2, atol=1e-2)
    assert (model(X) - trained).norm() < 1e-3 * trained.norm()


def test_what_merging_means_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    apply_lora(fake_quantized("int4 weights"), CONFIG)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "LoRA: 2 of the linears are fake-quantized: the adapters learn beside the rounded weights. Merged, they "
        "are rounded with the weights, and the outputs are others than in training."
    ]
    caplog.clear()
    apply_lora(nn.Sequential(nn.Linear(4, 4)), CONFIG)
    assert not caplog.records
