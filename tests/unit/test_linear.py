"""The adapter on one linear and on a plain model, on one device, without torchtitan."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from lora_converter import (
    LoRAConfig,
    LoRALinear,
    adapter_parameters,
    apply_lora,
    count_parameters,
    merge_adapter,
    reset_adapters,
    unmerge_adapter,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, bias=True)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x).relu())) * self.gain


def adapted(**fields) -> Block:
    torch.manual_seed(0)
    model = Block()
    apply_lora(model, LoRAConfig(rank=3, **fields))
    return model


def fill_b(model: nn.Module) -> None:
    """Away from zero, so that the update shows."""
    with torch.no_grad():
        for name, param in adapter_parameters(model).items():
            if "lora_b" in name:
                param.normal_()


def test_a_new_adapter_changes_no_output_and_no_name() -> None:
    torch.manual_seed(0)
    base = Block()
    x = torch.randn(5, 6)
    model = copy.deepcopy(base)
    apply_lora(model, LoRAConfig(rank=3))
    assert torch.equal(model(x), base(x))
    state = model.state_dict()
    assert set(base.state_dict()) == set(state) - set(adapter_parameters(model))
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_gradients_are_those_of_the_formula(use_rslora: bool) -> None:
    model = adapted(alpha=5.0, use_rslora=use_rslora).double()
    fill_b(model)
    linear = model.up
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    out = linear(x)
    grads = torch.autograd.grad(out.square().sum(), [x, linear.lora_a.weight, linear.lora_b.weight])

    scaling = 5.0 / (math.sqrt(3) if use_rslora else 3)
    weight = linear.weight + scaling * linear.lora_b.weight @ linear.lora_a.weight
    expected = x @ weight.T + linear.bias
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, linear.lora_a.weight, linear.lora_b.weight])
    # fp64, sums of at most 10 terms: a few units of 1e-16.
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-13, atol=1e-13)


def test_exactly_the_adapters_train() -> None:
    model = adapted()
    model(torch.randn(5, 6)).sum().backward()
    with_grad = {name for name, param in model.named_parameters() if param.grad is not None}
    assert with_grad == {f"{linear}.{factor}.weight" for linear in ("up", "down") for factor in ("lora_a", "lora_b")}
    assert with_grad == set(adapter_parameters(model))
    count = count_parameters(model)
    assert (count.adapted, count.trainable, count.total) == (2, 2 * 3 * 16, 2 * 3 * 16 + 70 + 60 + 12 + 6)


def test_adapter_values_depend_on_seed_and_name_alone() -> None:
    first, second = adapted(), adapted(target_modules=["down"])
    assert torch.equal(first.down.lora_a.weight, second.down.lora_a.weight)
    twins = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    apply_lora(twins, LoRAConfig(rank=3))
    assert not torch.equal(twins[0].lora_a.weight, twins[1].lora_a.weight)
    reset_adapters(first, seed=1)
    assert not torch.equal(first.down.lora_a.weight, second.down.lora_a.weight)
    bound = 1 / math.sqrt(10)
    assert 0.8 * bound < first.down.lora_a.weight.abs().max() < bound


def test_initialising_adapters_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    model = Block()
    state = torch.get_rng_state()
    apply_lora(model, LoRAConfig(rank=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deep_copy_has_adapters_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert type(twin.up) is type(model.up) and isinstance(twin.up, LoRALinear) and isinstance(twin.up, nn.Linear)
    fill_b(twin)
    assert not model.up.lora_b.weight.any() and twin.up.lora_b.weight.all()


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model = adapted(dropout=0.5)
    fill_b(model)
    x = torch.randn(5, 6)
    base = nn.functional.linear(x, model.up.weight, model.up.bias)
    torch.manual_seed(0)
    out = model.up(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    update = 32 / 3 * dropped @ model.up.lora_a.weight.T @ model.up.lora_b.weight.T
    torch.testing.assert_close(out, base + update)
    model.eval()
    assert torch.equal(model.up(x), model.up(x))


class DoublingLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_any_linear_subclass_keeps_its_own_forward() -> None:
    model = nn.Sequential(DoublingLinear(6, 10), DoublingLinear(10, 6))
    x = torch.randn(5, 6)
    before = model(x)
    apply_lora(model, LoRAConfig(rank=3))
    assert torch.equal(model(x), before)
    assert type(model[0]) is type(model[1])
    assert isinstance(model[0], DoublingLinear) and isinstance(model[0], LoRALinear)
    assert "rank=3, alpha=32.0" in repr(model[0])


def test_a_second_apply_is_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        apply_lora(model, LoRAConfig())


def test_a_failed_apply_leaves_the_model_as_it_was() -> None:
    model = Block()
    with pytest.raises(ValueError, match="'nope' matches no linear"):
        apply_lora(model, LoRAConfig(target_modules=["up", "nope"]))
    assert type(model.up) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_the_core_imports_without_torchtitan() -> None:
    code = "import sys; sys.modules['torchtitan'] = None; import lora_converter; lora_converter.apply_lora"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_merging_moves_the_update_into_the_weight_and_unmerging_takes_it_back_bit_for_bit() -> None:
    model = adapted()
    fill_b(model)
    x = torch.randn(5, 6)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    merge_adapter(model)
    delta = 32 / 3 * model.up.lora_b.weight @ model.up.lora_a.weight
    torch.testing.assert_close(model.up.weight, before["up.weight"] + delta)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"2 adapters are merged already, up among them: unmerge_adapter first\."):
        merge_adapter(model)
    unmerge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=r"2 adapters are not merged, up among them: merge_adapter first\."):
        unmerge_adapter(model)
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        merge_adapter(nn.Linear(2, 2))
