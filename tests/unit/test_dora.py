"""DoRA against PEFT's own module: values, gradients, steps; merged; beside what it refuses."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hf_tiny import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torchao.core.config import AOBaseConfig
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

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
from lora_converter.adapted import adapted_modules
from lora_converter.dora import DoRALinear
from lora_converter.linear import LoRALinear
from lora_converter.merge import merge_directories
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, from_model, into_model, load_peft, save_peft
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack

TOKENS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def config(**options: object) -> LoRAConfig:
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "target_modules": TARGETS, "use_dora": True, **options})


def pair(**options: float) -> tuple[nn.Module, PeftModel]:
    """One model, with our adapters and with PEFT's, of equal values that are not those of the start."""
    ours, dropout = tiny_llama(), options.get("dropout", 0.0)
    apply_lora(ours, config(**options))
    theirs = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, lora_dropout=dropout)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in adapted_modules(ours):
            twin = theirs.get_submodule(f"base_model.model.{module.lora_fqn}")
            change = 0.3 * torch.randn(module.out_features, generator=generator)
            for mine, its in (
                (module.lora_a.weight, twin.lora_A.default.weight),
                (module.lora_b.weight, twin.lora_B.default.weight),
            ):
                mine.normal_(std=0.1, generator=generator)
                its.copy_(mine)
            module.lora_magnitude_change.copy_(change)
            its = twin.lora_magnitude_vector.default.weight
            torch.testing.assert_close(its, module.row_norms(), rtol=1e-6, atol=0)  # where PEFT begins
            its.add_(change)
    return ours, theirs


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(ours: nn.Module, theirs: PeftModel) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    found = []
    for module in adapted_modules(ours):
        twin = theirs.get_submodule(f"base_model.model.{module.lora_fqn}")
        its = (twin.lora_A.default.weight, twin.lora_B.default.weight, twin.lora_magnitude_vector.default.weight)
        found += [(name, p, q) for (name, p), q in zip(module.adapter_parameters().items(), its, strict=True)]
    return found


def test_values_and_gradients_are_pefts() -> None:
    ours, theirs = pair()
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        loss_of(model).backward()
    for name, mine, its in gradients(ours, theirs):
        assert mine.grad.any(), name
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-5 * float(its.grad.abs().max()), msg=name)


def test_ten_steps_are_pefts() -> None:
    ours, theirs = pair()
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        own = []
        for _ in range(10):
            loss = loss_of(model)
            own.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(own)
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


def test_dropout_is_where_pefts_is() -> None:
    ours, theirs = pair(dropout=0.3)
    one = ours.model.layers[0].mlp.gate_proj
    twin = theirs.get_submodule(f"base_model.model.{one.lora_fqn}")
    x = torch.randn(5, one.in_features, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    one._mask = lambda *_: keep

    class Dropped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * keep / 0.7

    twin.lora_dropout["default"] = Dropped()
    torch.testing.assert_close(one.train()(x), twin.train()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.eval()(x), LoRALinear.forward(one, x))


def test_it_begins_as_the_base_bit_for_bit() -> None:
    model = tiny_llama()
    expected = model(input_ids=TOKENS).logits
    apply_lora(model, config())
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    loss_of(model).backward()
    own = [module for module in adapted_modules(model) if isinstance(module, DoRALinear)]
    assert len(own) == len(TARGETS) * len(model.model.layers)
    assert all(module.lora_magnitude_change.grad.any() for module in own)


def test_merged_it_is_what_peft_merges_and_comes_back_bit_for_bit() -> None:
    ours, theirs = pair()
    before, plain = ours(input_ids=TOKENS).logits, tiny_llama()
    with disable_adapter(ours):
        assert torch.equal(ours(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    merge_adapter(ours)
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, before, rtol=1e-5, atol=1e-5)
    unmerge_adapter(ours)
    assert torch.equal(ours(input_ids=TOKENS).logits, before)
    merge_and_unload(ours)
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert merged.keys() == dict(ours.named_parameters()).keys()
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_transposed_weight_and_a_bias() -> None:
    linear, conv = nn.Linear(6, 8), Conv1D(8, 6)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias.normal_())
    x, outs = torch.randn(3, 6), []
    for module in (linear, conv):
        model = nn.Sequential(module)
        apply_lora(model, config(target_modules=["0"]))
        with torch.no_grad():
            for number, param in enumerate(adapter_parameters(model).values()):
                param.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        outs.append(model(x))
        merge_adapter(model)
        torch.testing.assert_close(model(x), outs[-1])
        unload_adapter(model)
        assert type(model[0]) in (nn.Linear, Conv1D) and not any("lora" in name for name in vars(model[0]))
    torch.testing.assert_close(*outs)


def test_state_goes_out_and_in() -> None:
    ours, _ = pair()
    other = tiny_llama()
    apply_lora(other, config())
    load_adapter_state_dict(other, adapter_state_dict(ours))
    assert torch.equal(other(input_ids=TOKENS).logits, ours(input_ids=TOKENS).logits)
    assert torch.equal(copy.deepcopy(other)(input_ids=TOKENS).logits, ours(input_ids=TOKENS).logits)


def test_packages_go_to_adapters_and_not_to_weights() -> None:
    ours, _ = pair()
    other, package = tiny_llama(), pack(ours, version=0, base="it")
    with pytest.raises(ValueError, match=r"lora_magnitude_change, which is no increment of a weight"):
        IncrementReceiver(other, base="it").receive(package)
    apply_lora(other, config())
    AdapterReceiver(other, base="it").receive(package)
    assert torch.equal(other(input_ids=TOKENS).logits, ours(input_ids=TOKENS).logits)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def quantized(settings: AOBaseConfig) -> Callable[[nn.Linear], nn.Module]:
    def convert(linear: nn.Linear) -> nn.Module:
        model = nn.Sequential(linear)
        quantize_(model, settings)
        return model[0]

    return convert


NOT_DENSE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "a product of its own": lambda linear: Doubled(32, 32),
    "float8": lambda linear: Float8Linear.from_float(linear, Float8LinearConfig(emulate=True)),
    "fake-quantized": quantized(
        QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
    ),
    "quantized": quantized(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_linear_of_no_dense_weight_is_refused_and_nothing_changed(kind: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), NOT_DENSE[kind](nn.Linear(32, 32)))
    with pytest.raises(ValueError, match=r"use_dora = true: 1 is a \w+, which is packed or has a product of its own"):
        apply_lora(model, config(target_modules=["all-linear"]))
    assert not list(adapted_modules(model))


def test_the_autocast_of_a_trainer_leaves_the_scale_in_fp32() -> None:
    linear = nn.Sequential(nn.Linear(16, 8, bias=False))
    apply_lora(linear, config(target_modules=["0"]))
    x = torch.randn(4, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = linear(x)
        linear[0].lora_magnitude_change.copy_(linear[0].row_norms())
        assert torch.equal(linear(x), before * 2) and before.dtype is torch.bfloat16


def test_files_go_both_ways_through_peft(tmp_path: Path) -> None:
    ours, theirs = pair()
    save_peft(from_model(ours), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, its = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert mine.keys() == its.keys() and any(key.endswith(".lora_magnitude_vector") for key in its)
    for name, value in its.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-7)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    expected = ours(input_ids=TOKENS).logits
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    again = tiny_llama()
    apply_lora(again, config())
    into_model(load_peft(tmp_path / "theirs"), again)
    torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    plain = tiny_llama()
    apply_lora(plain, config(use_dora=False))
    with pytest.raises(ValueError, match=r"has use_dora = True, the model False: give apply_lora use_dora = True\."):
        into_model(load_peft(tmp_path / "theirs"), plain)
    save_peft(from_model(plain), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"give apply_lora use_dora = False\."):
        into_model(load_peft(tmp_path / "plain"), again)
    into_model(load_peft(tmp_path / "plain"), plain)
    assert torch.equal(again(input_ids=TOKENS).logits, expected)


def test_a_directory_in_bf16_loses_nothing_of_a_small_change(tmp_path: Path) -> None:
    """Rounded to bf16 the magnitudes would scale each row by up to 0.2 %."""
    model = tiny_llama()
    start = model(input_ids=TOKENS).logits
    apply_lora(model, config())
    for index, param in enumerate(adapter_parameters(model).values()):
        param.data.add_(1e-3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(index)))
    save_peft(from_model(model), tmp_path / "it", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "it" / WEIGHTS_FILE).values()} == {
        torch.bfloat16,
        torch.float32,
    }
    now = model(input_ids=TOKENS).logits
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "it")
    assert (loaded(input_ids=TOKENS).logits - now).norm() < 1e-2 * (now - start).norm()


@pytest.mark.parametrize("rows_at_a_time", [2**24, 1000])
def test_folders_merge_to_what_peft_merges(rows_at_a_time: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lora_converter.hf.merged_rows._ELEMENTS_AT_A_TIME", rows_at_a_time)
    _, theirs = pair()
    tiny_llama().save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_transposed_weights_merge_to_what_peft_merges(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lora_converter.hf.merged_rows._ELEMENTS_AT_A_TIME", 1000)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    base.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs = get_peft_model(base, settings)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                param.add_(0.1 * torch.randn_like(param))
    theirs.save_pretrained(tmp_path / "adapter")
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_magnitudes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    ours, _ = pair()
    save_peft(from_model(ours), tmp_path / "it")
    path = tmp_path / "it" / WEIGHTS_FILE
    module = "model.layers.0.mlp.down_proj"
    tensors, key = load_file(path), f"base_model.model.{module}.lora_magnitude_vector"

    def refused(**changed: torch.Tensor | None) -> str:
        save_file({n: v for n, v in {**tensors, **changed}.items() if v is not None}, path)
        with pytest.raises(ValueError) as caught:
            load_peft(tmp_path / "it")
        return str(caught.value)

    assert f"use_dora = true, and {module} have no lora_magnitude_vector" in refused(**{key: None})
    assert f"{module} is (3,), must be (64,)" in refused(**{key: torch.ones(3)})
    assert f"{module} is there twice, as '{key}.weight' too" in refused(**{f"{key}.weight": torch.ones(64)})
    said = json.loads((tmp_path / "it" / CONFIG_FILE).read_text())
    (tmp_path / "it" / CONFIG_FILE).write_text(json.dumps({**said, "use_dora": False}))
    assert "use_dora = false, and model.layers.0.mlp.down_proj, " in refused()


def test_rows_of_zeros_stay_zero_and_harm_no_other() -> None:
    """Of a padded vocabulary, say. PEFT's module divides by their norms."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[0].weight[1:3] = 0
    apply_lora(model, config(target_modules=["0"]))
    optimizer, x = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2), torch.randn(5, 6)
    for _ in range(3):
        model(x)[:, [0, 3]].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    out = model(x)
    assert out[:, [0, 3]].all() and out.isfinite().all() and not out[:, 1:3].any()
    merge_adapter(model)
    torch.testing.assert_close(model(x), out)


def test_a_merged_model_has_the_norms_of_its_base() -> None:
    ours, _ = pair()
    before = from_model(ours)
    merge_adapter(ours)
    for module, own in from_model(ours).magnitudes.items():
        assert torch.equal(own, before.magnitudes[module])
