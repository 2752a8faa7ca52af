"""PiSSA and OLoRA against PEFT's own modules, which put the rest of the weight in the base's place."""

from pathlib import Path

import pytest
import torch
from hf_tiny import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model

from lora_converter import LoRAConfig, apply_lora, disable_adapter, merge_and_unload
from lora_converter.adapted import adapted_modules
from lora_converter.offset import OffsetLinear, initial_factors
from lora_converter.peft import from_model, save_peft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUTS = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
KINDS = pytest.mark.parametrize(("init", "use_rslora"), [("pissa", False), ("pissa", True), ("olora", False)])


def ours(init: str, *, use_rslora: bool = False) -> torch.nn.Module:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(rank=4, alpha=6.0, init=init, use_rslora=use_rslora, target_modules=TARGETS))
    return model


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=INPUTS, labels=INPUTS).loss
    return loss


def train(model: torch.nn.Module, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@KINDS
def test_values_gradients_and_steps_are_those_of_peft(init: str, use_rslora: bool) -> None:
    model = ours(init, use_rslora=use_rslora)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_rslora=use_rslora, target_modules=TARGETS)
    twin = get_peft_model(tiny_llama(), config)
    theirs = dict(twin.named_parameters())
    pairs = [
        (factor.weight, theirs[f"base_model.model.{module.lora_fqn}.{name}.default.weight"])
        for module in adapted_modules(model)
        if isinstance(module, OffsetLinear)
        for name, factor in (("lora_A", module.lora_a), ("lora_B", module.lora_b))
    ]
    assert len(pairs) == 2 * len(TARGETS) * model.config.num_hidden_layers
    assert all(torch.equal(mine, its) for mine, its in pairs)
    for each in (model, twin):
        loss_of(each).backward()
    for mine, its in pairs:
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-5 * its.grad.abs().max().item(), rtol=1e-5)
    for each in (model, twin):
        each.zero_grad()
    # fp32 products in another order
    torch.testing.assert_close(train(model), train(twin), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUTS).logits, twin(INPUTS).logits, atol=1e-4, rtol=1e-4)


@KINDS
def test_the_model_is_the_base_to_the_bit_at_the_start_in_any_dtype(init: str, use_rslora: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        before = model(INPUTS).logits
        apply_lora(model, LoRAConfig(rank=4, init=init, use_rslora=use_rslora, target_modules=TARGETS))
        assert torch.equal(model(INPUTS).logits, before)


def test_only_the_moving_factors_train_and_the_base_stays_as_it_is() -> None:
    model, base = ours("pissa"), dict(tiny_llama().named_parameters())
    train(model)
    params = dict(model.named_parameters())
    assert {name.split(".lora_")[1] for name, p in params.items() if p.requires_grad} == {"a.weight", "b.weight"}
    assert all(torch.equal(params[name], value) for name, value in base.items())
    with torch.no_grad(), disable_adapter(model):
        assert torch.equal(model(INPUTS).logits, tiny_llama()(INPUTS).logits)


@KINDS
def test_peft_and_a_merge_give_what_was_trained(init: str, use_rslora: bool, tmp_path: Path) -> None:
    model = ours(init, use_rslora=use_rslora)
    train(model)
    adapter = from_model(model)
    assert {a.shape[0] for a, _ in adapter.factors.values()} == {8}
    save_peft(adapter, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        want = model(INPUTS).logits
        torch.testing.assert_close(loaded(INPUTS).logits, want, atol=2e-5, rtol=1e-5)
        merge_and_unload(model)
        torch.testing.assert_close(model(INPUTS).logits, want, atol=2e-5, rtol=1e-5)


def test_a_randomised_decomposition_is_near_the_exact_one_and_the_same_each_time() -> None:
    def products(init: str) -> list[torch.Tensor]:
        modules = [m for m in adapted_modules(ours(init)) if isinstance(m, OffsetLinear)]
        return [(m.lora_b.weight @ m.lora_a.weight).detach() for m in modules]

    first = products("pissa_niter_16")
    torch.manual_seed(7)
    again, exact = products("pissa_niter_16"), products("pissa")
    assert all(map(torch.equal, first, again))
    for near, product in zip(first, exact, strict=True):
        # Singular values of random weights are near each other, so that iterations separate them slowly.
        assert (near.norm() - product.norm()).abs() < 0.02 * product.norm()


def test_a_randomised_decomposition_leaves_the_generator_alone() -> None:
    weight, before = torch.randn(12, 8), torch.random.get_rng_state()
    initial_factors(weight, LoRAConfig(rank=2, init="pissa_niter_2"), name="layers.0")
    assert torch.equal(torch.random.get_rng_state(), before)
