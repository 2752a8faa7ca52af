"""Merging into what was trained on packed weights, against bitsandbytes' NF4 and PEFT's own updates, bit for bit.

Factors hold few bits, so that their products are exact in fp32 whatever order they are summed in: what is left is the
sum of two fp32 numbers and its one rounding.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from hf_models import HF_MODELS
from hf_tiny import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import SIZES, save_fused, with_random_weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lora_converter.cli import main
from lora_converter.hf import merged_rows
from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.packed_base import PackedBase, packed_base
from lora_converter.hf.peft_directory import load_peft, save_peft
from lora_converter.linear import linear_shapes
from lora_converter.merge import merge_directories

WIDE = {**SIZES, "hidden_size": 64, "head_dim": 16}


def qwen3_moe(inner: int = 128) -> PreTrainedModel:
    config = Qwen3MoeConfig(**WIDE, num_experts=4, intermediate_size=64, moe_intermediate_size=inner)
    return with_random_weights(Qwen3MoeForCausalLM, config)


def llama4() -> PreTrainedModel:
    config = Llama4TextConfig(
        **{**WIDE, "num_experts_per_tok": 1}, num_local_experts=4, intermediate_size=128, intermediate_size_mlp=64,
        interleave_moe_layer_step=1, use_qk_norm=False, attn_temperature_tuning=False,
    )  # fmt: skip
    return with_random_weights(Llama4ForCausalLM, config)


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(**WIDE, num_local_experts=4, intermediate_size=128, sliding_window=16)
    return with_random_weights(GptOssForCausalLM, config)


def gpt2() -> PreTrainedModel:
    """Conv1D: every weight is (in, out), and that of c_proj in the attention is square."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    return with_random_weights(GPT2LMHeadModel, config)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": ["q_proj", "down_proj"]}),
    "qwen3_moe": (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "llama4": (llama4, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}),
    "gpt_oss": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
IN_FIRST = {"llama4": ("_proj",), "gpt_oss": ("_proj",), "gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}
"""Ends of the keys of weights that are stored as (in, out) or (experts, in, out)."""


def folders(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """base/, in `dtype`, and adapter/, made by PEFT, which says nothing of packed weights."""
    make, targets = MODELS[name]
    model = make().to(dtype)
    save_fused(model, folder / "base") if name in ("llama4", "gpt_oss") else model.save_pretrained(folder / "base")
    peft = get_peft_model(model.float(), LoraConfig(r=4, lora_alpha=2, task_type="CAUSAL_LM", **targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 32)
    peft.save_pretrained(folder / "adapter")
    return peft


def merged(folder: Path, *options: str, adapter: str = "adapter") -> dict[str, torch.Tensor]:
    paths = ["--base", f"{folder}/base", "--adapter", f"{folder}/{adapter}", "--output", f"{folder}/merged"]
    assert main(["merge", *paths, *options]) == 0
    return load_file(folder / "merged" / "model.safetensors")


def as_trained(weight: torch.Tensor, *, in_first: bool = False) -> torch.Tensor:
    """bitsandbytes' dequantised NF4 of a weight, or of each of stacked ones, in fp32."""
    if weight.ndim == 3:
        return torch.stack([as_trained(each, in_first=in_first) for each in weight])
    if in_first:
        return as_trained(weight.t().contiguous()).t()
    codes, state = bitsandbytes.quantize_4bit(weight.bfloat16(), quant_type="nf4", blocksize=64)
    state.dtype = torch.float32
    return bitsandbytes.dequantize_4bit(codes, state)


def is_packed(key: str, value: torch.Tensor) -> bool:
    """Said otherwise than in the package: what is left is an embedding, a head, a router, a norm or a bias."""
    left_out = ("lm_head", "embed", "wte", "wpe", ".gate.weight", "router", "norm", "ln_", "bias", "sinks")
    return value.ndim > 1 and not any(part in key for part in left_out)


def deltas_of(peft: PeftModel) -> dict[str, torch.Tensor]:
    """Key of a weight in transformers' model -> PEFT's update of it."""
    found = {}
    for name, module in peft.named_modules():
        if isinstance(module, LoraLayer):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", "weight")
            found[f"{plain}.{parameter}"] = module.get_delta_weight("default").detach()
    return found


def delta_of(key: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor | float:
    """Of a key of the folder, where an expert may have its own."""
    if parts := split_expert(key.removesuffix(".weight")):
        layer, number, product = parts
        delta = deltas[f"{layer}.down_proj" if product == "down_proj" else f"{layer}.gate_up_proj"][number]
        return delta if product == "down_proj" else delta.chunk(2)[product == "up_proj"]
    return deltas.get(key, 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_bitsandbytes_own_plus_pefts_update_rounded_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_rows, "_ELEMENTS_AT_A_TIME", 5000)  # some rows at a time
    deltas = deltas_of(folders(name, tmp_path))
    base = load_file(tmp_path / "base" / "model.safetensors")
    packed = {key for key, value in base.items() if is_packed(key, value)}
    assert len(deltas) < len(packed) < len(base)
    exact = {
        key: as_trained(value, in_first=key.endswith(IN_FIRST.get(name, "none"))) + delta_of(key, deltas)
        if key in packed
        else value
        for key, value in base.items()
    }
    for dtype in (torch.bfloat16, torch.float32):
        found = merged(tmp_path, "--base-as", "nf4", "--dtype", str(dtype).removeprefix("torch."))
        assert found.keys() == base.keys() and {value.dtype for value in found.values()} == {dtype}
        assert [key for key, value in exact.items() if not torch.equal(found[key], value.to(dtype))] == []
        assert not any(torch.equal(found[key], base[key].to(dtype)) for key in packed)
        shutil.rmtree(tmp_path / "merged")


def test_a_base_in_fp32_is_rounded_to_bf16_before_it_is_packed(tmp_path: Path) -> None:
    deltas = deltas_of(folders("llama", tmp_path, torch.float32))
    base, found = load_file(tmp_path / "base" / "model.safetensors"), merged(tmp_path, "--base-as", "nf4")
    for key in (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down")):
        assert torch.equal(found[key], as_trained(base[key]) + delta_of(key, deltas))


def record(folder: Path, packed: PackedBase, **fields: object) -> None:
    save_peft(replace(load_peft(folder / "adapter"), packed=packed, **fields), folder / "recorded")


def test_the_record_is_written_read_and_decides_and_both_choices_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_converter")
    folders("llama", tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    # An odd choice, and a layer of the base, for multi-token prediction, that the training's model did not have.
    names = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in (0, 1) for name in ("up", "down")]
    extra = {key.replace("layers.0.", "layers.9."): value.clone() for key, value in base.items() if "layers.0." in key}
    save_file({**base, **extra}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    packed = PackedBase.of("nf4", names)
    assert packed.weights == ("model.layers.{0-1}.mlp.down_proj.weight", "model.layers.{0-1}.mlp.up_proj.weight")
    record(tmp_path, packed)
    assert load_peft(tmp_path / "recorded").packed == packed
    assert load_peft(tmp_path / "adapter").packed is None

    both = {choice: merged(tmp_path, *choice, adapter="recorded") for choice in [("--base-as", "nf4")]}
    assert json.loads((tmp_path / "merged" / "lora_merge.json").read_text())["base_as"] == "nf4"
    (tmp_path / "merged").rename(tmp_path / "as nf4")
    both[()] = merged(tmp_path, adapter="recorded")
    assert "base_as" not in json.loads((tmp_path / "merged" / "lora_merge.json").read_text())
    changed = {key for key, value in both[()].items() if not torch.equal(value, both["--base-as", "nf4"][key])}
    assert changed == set(names)
    said = [message for message in caplog.messages if "--base-as" in message]
    assert said == [
        "4 weights of the base are merged as nf4, as the training had them; without --base-as the base's own are.",
        "The adapter was trained on nf4 weights, and is merged into the base's own; `lora-converter merge --base-as "
        "nf4` takes those of the training.",
    ]


def test_without_a_record_names_decide_and_the_log_says_what_they_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    odd = {"model.vision.patch_embed.weight": torch.randn(64, 64), "model.vision.proj.weight": torch.randn(64, 40)}
    save_file({**load_file(path), **odd}, path, metadata={"format": "pt"})
    found = merged(tmp_path, "--base-as", "nf4")
    assert all(torch.equal(found[key], value) for key, value in odd.items())
    assert [message for message in caplog.messages if "does not say" in message] == [
        "The adapter does not say which weights its training had packed. Their names say: 8 linears and 24 weights of "
        "experts are nf4; model.vision.proj.weight cannot be packed."
    ]


@pytest.mark.parametrize("stored", ["single", "stacked"])
def test_a_record_holds_in_whatever_form_the_base_stores_its_experts(stored: str, tmp_path: Path) -> None:
    peft = folders("qwen3_moe", tmp_path)
    layers = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    names = [f"{layer}.{e}.{p}_proj.weight" for layer in layers for e in range(4) for p in ("gate", "up", "down")]
    if stored == "single":
        names = [f"{layer}.{stack}" for layer in layers for stack in ("gate_up_proj", "down_proj")]
    else:
        (tmp_path / "base").rename(tmp_path / "published")
        save_fused(qwen3_moe().bfloat16(), tmp_path / "base")
    record(tmp_path, PackedBase.of("nf4", names))
    base = load_file(tmp_path / "base" / "model.safetensors")
    found, deltas = merged(tmp_path, "--base-as", "nf4", adapter="recorded"), deltas_of(peft)
    for key, value in base.items():
        weight = as_trained(value) if "experts" in key else value.float()
        assert torch.equal(found[key], (weight + delta_of(key, deltas)).bfloat16()), key


def test_a_stack_of_which_a_part_was_packed_is_refused(tmp_path: Path) -> None:
    folders("qwen3_moe", tmp_path)
    (tmp_path / "base").rename(tmp_path / "published")
    save_fused(qwen3_moe(), tmp_path / "base")
    record(tmp_path, PackedBase.of("nf4", [f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in range(4)]))
    with pytest.raises(ValueError, match=r"had model\.layers\.0\.mlp\.experts\.gate_up_proj packed, which"):
        merge_directories(tmp_path / "base", tmp_path / "recorded", tmp_path / "merged", base_as="nf4")


NAMES = st.sets(
    st.builds(
        "model.layers.{}.{}.weight".format,
        st.integers(0, 6),
        st.one_of(
            st.sampled_from(["q_proj", "up_proj", "03"]),
            st.builds("experts.{}.{}".format, st.integers(0, 4), st.sampled_from(["w1", "w2"])),
        ),
    )
)


@given(NAMES)
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
def test_patterns_mean_the_names_they_were_made_of_and_no_others(names: set[str]) -> None:
    packed = PackedBase.of("nf4", names)
    assert sorted(packed.names()) == sorted(names)
    assert PackedBase.from_metadata({"format": "pt", **packed.to_metadata()}, "it") == packed


def test_a_record_of_a_large_model_is_short() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight"
        for i in range(3, 61)
        for e in range(256)
        for p in ("gate", "up", "down")
    ]
    assert PackedBase.of("nf4", names).weights == tuple(
        f"model.layers.{{3-60}}.mlp.experts.{{0-255}}.{p}_proj.weight" for p in ("down", "gate", "up")
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"lora_converter.packed_weights": "[]"}, "weights were packed as ''"),
        ({"lora_converter.base_format": "nf3", "lora_converter.packed_weights": "[]"}, "known are nf4, nf4-fp32"),
        ({"lora_converter.base_format": "nf4"}, "is no list of names"),
        ({"lora_converter.base_format": "nf4", "lora_converter.packed_weights": '{"a": 1}'}, "is no list of names"),
        ({"lora_converter.base_format": "nf4", "lora_converter.packed_weights": "[1]"}, "is no list of names"),
        (
            {"lora_converter.base_format": "nf4", "lora_converter.packed_weights": '["a.{0-99999999999}.b"]'},
            "more weights than any model has",
        ),
    ],
)
def test_a_damaged_record_is_refused_when_the_directory_is_read(
    header: dict[str, str], message: str, tmp_path: Path
) -> None:
    folders("llama", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", **header})
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "adapter")


def host_weights(name: str) -> tuple[dict[str, tuple[int, ...]], object]:
    """A model of torchtitan's, the weights that its training would pack, and its StateDictAdapter."""
    from lora_converter.titan.models import model_on_meta

    flavor = {"qwen3_moe": "hf_tiny_moe"}.get(name, "hf_tiny")
    source = model_on_meta(name.removesuffix("_moe"), flavor)
    model, adapter, classes = source.model, source.state_dict_adapter, source.expert_classes
    weights = {f"{fqn}.weight": shape for fqn, shape in linear_shapes(model).items()}
    weights |= {
        f"{fqn}.{weight}": tuple(getattr(module, weight).shape)
        for fqn, module in model.named_modules()
        if type(module) in classes
        for weight in classes[type(module)].expert_weights
    }
    blocks = {key: shape for key, shape in weights.items() if shape[-1] % 64 == 0}
    return {k: s for k, s in blocks.items() if not k.startswith("output") and "router" not in k}, adapter


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "llama4", "gpt_oss", "deepseek_v3"])
def test_a_hosts_packed_weights_are_those_of_transformers_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from hf_tiny import tiny_gpt_oss

    weights, adapter = host_weights(name)
    packed = packed_base(adapter, {key: ("nf4", shape) for key, shape in weights.items()})
    assert packed is not None and packed.form == "nf4"
    model = tiny_gpt_oss() if name == "gpt_oss" else HF_MODELS[name].make()
    there = {
        key.replace("model.language_model", "language_model.model"): value
        for key, value in model.state_dict().items()
        if is_packed(key, value) and "vision" not in key and "multi_modal" not in key
    }
    if name in ("qwen3_moe", "deepseek_v3"):  # transformers stacks what is stored by itself
        there = {
            each.format(e, product): value
            for key, value in there.items()
            for each, products in [
                (key.replace("gate_up_proj", "{}.{}.weight"), ("gate_proj", "up_proj"))
                if key.endswith("gate_up_proj")
                else (key.replace("down_proj", "{}.{}.weight"), ("down_proj",))
                if key.endswith("experts.down_proj")
                else (key, ("",))
            ]
            for product in products
            for e in range(value.shape[0] if "{}" in each else 1)
        }
    in_first = name in ("llama4", "gpt_oss")
    columns = {key: value.shape[-2 if value.ndim == 3 and in_first else -1] for key, value in there.items()}
    assert not any("are packed" in message for message in caplog.messages)
    assert set(packed.names()) == {key for key, count in columns.items() if count % 64 == 0}


def test_a_weight_whose_columns_stand_in_another_order_has_no_name(caplog: pytest.LogCaptureFixture) -> None:
    class Reversed:
        hf_assets_path = None

        def to_hf(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {f"hf.{key}": value.flip(-1) if "odd" in key else value.flip(0) for key, value in state_dict.items()}

    packed = packed_base(Reversed(), {f"{name}.weight": ("nf4", (8, 64)) for name in ("odd", "even")})
    assert packed is not None and packed.weights == ("hf.even.weight",)
    assert [message.partition(" are packed")[0] for message in caplog.messages] == ["LoRA: odd.weight"]


def test_inspect_shows_what_packing_changed_beside_the_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = folders("qwen3_moe", tmp_path)
    adapter, base = str(tmp_path / "adapter"), str(tmp_path / "base")
    weights, deltas = load_file(tmp_path / "base" / "model.safetensors"), deltas_of(peft)
    assert main(["inspect", adapter, "--base", base]) == 0
    plain = capsys.readouterr().out
    assert main(["inspect", adapter, "--base", base, "--base-as", "nf4"]) == 0
    shown = capsys.readouterr().out
    assert [line.partition("  |packing|")[0] for line in shown.splitlines()] == plain.splitlines()
    assert "packing" not in plain and shown.count("  |packing|") == shown.count("  |update| ") // 2 == 8
    key = "model.layers.1.self_attn.q_proj.weight"
    error = (weights[key].float() - as_trained(weights[key])).norm()
    ratio = deltas[key].norm() / error
    assert f"  |packing| {error:.3e}  |update| / |packing| {ratio:.3g}\n" in shown
    key = "model.layers.1.mlp.experts"
    errors, ratios = {}, {}
    for e in range(4):
        weight = weights[f"{key}.{e}.down_proj.weight"]
        errors[e] = float((weight.float() - as_trained(weight)).norm())
        ratios[e] = float(deltas[f"{key}.down_proj"][e].norm()) / errors[e]
    line = next(line for line in shown.splitlines() if line.startswith(f"{key}.*.down_proj"))
    largest = max(errors, key=errors.__getitem__)
    assert f"|packing| {min(errors.values()):.3e} to {errors[largest]:.3e} (expert {largest}), median" in line
    assert f"|update| / |packing| {min(ratios.values()):.3g} to {max(ratios.values()):.3g} (expert" in line

    record(tmp_path, PackedBase.of("nf4", [name for name in weights if is_packed(name, weights[name])]))
    assert main(["inspect", str(tmp_path / "recorded"), "--base", base]) == 0
    head, _, recorded = capsys.readouterr().out.partition("\n\n")
    assert head.endswith(", trained on nf4 weights") and recorded == shown.partition("\n\n")[2]
    merged(tmp_path, "--base-as", "nf4")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "merged")]) == 0
    assert f"\nbase: {base} as nf4\n" in capsys.readouterr().out


def test_magnitudes_are_those_of_the_weights_that_were_trained(tmp_path: Path) -> None:
    """DoRA on NF4 weights, by PEFT: W is the unpacked one in the sum and in its norm. fp32, sums in another order."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapted = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    with torch.no_grad():
        for name in adapted:
            weight = model.get_submodule(name).weight
            weight.copy_(as_trained(weight))
        peft = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]))
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))))
    peft.save_pretrained(tmp_path / "adapter")
    found, expected = merged(tmp_path, "--base-as", "nf4"), peft.merge_and_unload().state_dict()
    for name in adapted:
        torch.testing.assert_close(found[f"{name}.weight"], expected[f"{name}.weight"], rtol=1e-5, atol=1e-6)
