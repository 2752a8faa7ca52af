"""PEFT's own PiSSA and OLoRA files, saved without conversion: merged, loaded and trained on as PEFT does."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lora_converter import LoRAConfig, apply_lora
from lora_converter.cli import main
from lora_converter.merge import merge_directories
from lora_converter.peft import from_model, into_model, load_peft, save_peft

INPUTS = torch.arange(24).view(2, 12) * 7 % 320
TARGETS = ["q_proj", "down_proj"]
KINDS = pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "OLoRA", "use_rslora": True},
        {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        {"init_lora_weights": "pissa", "modules_to_save": ["model.norm"]},
    ],
    ids=["PiSSA", "OLoRA, rsLoRA", "patterns", "modules_to_save"],
)


def peft_adapter(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    """PEFT's model after what training may do to it, saved as PEFT saves it by itself."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, **{"target_modules": TARGETS} | options))
    for index, param in enumerate(p for p in model.parameters() if p.requires_grad):
        param.data += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says that a conversion is at hand
        model.save_pretrained(folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUTS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@KINDS
def test_merging_gives_what_peft_trained_and_loads(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    trained = peft_adapter(tiny_llama(), tmp_path / "adapter", **options)
    merge_directories(base, tmp_path / "adapter", tmp_path / "merged")
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").merge_and_unload()
    theirs = dict(loaded.named_parameters())
    changed = 0
    for name, weight in merged.named_parameters():  # the same decomposition; fp32 sums in another order
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(weight, dict(tiny_llama().named_parameters())[name])
    assert changed == 2 * 4 + len(options.get("modules_to_save", []))
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=2e-5)


def test_peft_rounds_the_changed_base_where_this_rounds_the_sum_alone(tmp_path: Path) -> None:
    base = tiny_llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    peft_adapter(tiny_llama().bfloat16(), tmp_path / "adapter", init_lora_weights="pissa")
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    weights = dict(type(base).from_pretrained(tmp_path / "merged").named_parameters())
    theirs = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "adapter").base_model.model
    checked = 0
    for name, module in theirs.named_modules():
        if name.endswith(tuple(TARGETS)):
            residual = module.base_layer.weight.float()
            off = weights[f"{name}.weight"] - residual - module.get_delta_weight("default").float()
            # Half a unit in the last of bf16's 8 bits of what PEFT rounded; 1e-6 of the rest.
            assert (off.abs() <= residual.abs() * 2.0**-8 + 1e-6).all() and off.any()
            checked += 1
    assert checked == 2 * 4


def test_weights_that_are_stored_transposed_are_decomposed_the_right_way_round(tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(3)
        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=320, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()

    gpt2().save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    trained = peft_adapter(gpt2(), tmp_path / "adapter", init_lora_weights="pissa", **options).eval()
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=2e-5)
    peft_adapter(
        gpt2(), tmp_path / "olora", init_lora_weights="olora", **{**options, "target_modules": ["attn.c_proj"]}
    )
    with pytest.raises(ValueError) as error:
        merge_directories(tmp_path / "base", tmp_path / "olora", tmp_path / "no")
    assert "h.1.attn.c_proj, whose weights are stored as (in, out)" in str(error.value)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_live_model_goes_on_from_it_as_pefts_does(init: str, tmp_path: Path) -> None:
    trained = peft_adapter(tiny_llama(), tmp_path / "adapter", init_lora_weights=init)
    adapter, model = load_peft(tmp_path / "adapter"), tiny_llama()
    plain, config = tiny_llama(), LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS)
    apply_lora(plain, config)
    with pytest.raises(ValueError, match=rf"that PEFT changed .*: give apply_lora init = '{init}'\."):
        into_model(adapter, plain)
    apply_lora(model, replace(config, init=init))
    into_model(adapter, model)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-5, atol=2e-5)
    twin = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    losses = []
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss = each(input_ids=INPUTS, labels=INPUTS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)
    save_peft(from_model(model), tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=2e-5)


def test_a_changed_base_that_cannot_be_had_again_is_refused_and_read_once_peft_has_converted_it(
    base: Path, tmp_path: Path
) -> None:
    def refused(adapter: Path, **merging: Any) -> str:
        with pytest.raises(ValueError, match="init_lora_weights") as error:
            merge_directories(base, adapter, tmp_path / "merged", **merging)
        return str(error.value)

    convert = "Let PEFT convert it where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)."
    head = {"init_lora_weights": "olora", "target_modules": ["q_proj", "lm_head"]}
    for name, options, told in (
        ("head", head, "an output head, whose change reaches a tied embedding; copies of changed weights, lm_head"),
        ("DoRA", {"init_lora_weights": "pissa", "use_dora": True}, "use_dora = true, whose magnitudes"),
    ):
        peft_adapter(tiny_llama(), tmp_path / name, **options)
        assert told in (message := refused(tmp_path / name)) and message.endswith(convert)
        assert "a base that PEFT changed, which cannot be computed again with" in message
    peft_adapter(tiny_llama(), tmp_path / "adapter", init_lora_weights="pissa")
    packed = refused(tmp_path / "adapter", base_as="nf4")
    assert "PEFT changed the base's own weights, not those packed as nf4. Leave --base-as out." in packed
    assert merge_directories(base, tmp_path / "adapter", tmp_path / "merged") == 8

    model = get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, **head, "init_lora_weights": "olora"}))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "olora"
    for param in (p for p in model.parameters() if p.requires_grad):
        param.data += 0.05
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
        model.save_pretrained(tmp_path / "converted", save_embedding_layers=False, **converted)
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    merge_directories(base, tmp_path / "converted", tmp_path / "plain")
    plain = type(tiny_llama()).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=5e-5)


def test_combining_and_showing_need_the_base_that_it_was(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = peft_adapter(tiny_llama(), tmp_path / "adapter", init_lora_weights="pissa")
    combined = ["combine", str(tmp_path / "adapter"), "--output", str(tmp_path / "plain")]
    for command in (combined, ["inspect", str(tmp_path / "adapter")]):
        assert main(command) == 1
        told = "to a base that PEFT changed (init_lora_weights = 'pissa'). Name the base as it was with --base"
        assert told in capsys.readouterr().err
        assert main([*command, "--base", str(base)]) == 0
    shown = capsys.readouterr().out
    assert "rank 8, alpha 12, scaling 1.5" in shown and "% of |weight|" in shown
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(trained), rtol=1e-5, atol=2e-5)
