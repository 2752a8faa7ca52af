"""Linears beside routed experts, in PEFT: it takes their names for experts', so they are written as parameters.

Tried with PEFT 0.21.2 and transformers 5.23, which fuse experts.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from harness import Run, build
from hf_models import HF_MODELS, save_hf
from peft import PeftModel
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.peft import CONFIG_FILE, from_model, into_model, load_peft, save_peft
from lora_converter.tensors import copy_full_

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
ALL = "--lora.target_modules=all-linear"


def fill_b(parameters: dict[str, torch.nn.Parameter]) -> None:
    for number, (name, param) in enumerate(parameters.items()):
        if name.endswith("lora_b.weight"):
            generator = torch.Generator().manual_seed(number)
            copy_full_(param, torch.empty(param.shape).normal_(std=0.1, generator=generator))


def trained(name: str, folder: Path, *options: str) -> Run:
    """All linears of a model adapted, every B away from zero."""
    base = save_hf(name, folder / "base")
    here = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", ALL, *options]
    run = build(folder / "run", *HF_MODELS[name].options, *here)
    run.trainer.checkpointer.load()
    fill_b(adapter_parameters(run.trainer.model_parts[0]))
    run.trainer.model_parts[0].eval()
    return run


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = (
            model.eval()(TOKENS)
            if not isinstance(model, PreTrainedModel | PeftModel)
            else model.eval()(input_ids=TOKENS)
        )
    return getattr(out, "logits", out)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4"])
@pytest.mark.parametrize("patterns", [[], ["--lora.rank=6"]], ids=["one rank", "another rank"])
def test_all_linears_of_a_mixture_load_in_peft(name: str, patterns: list[str], tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    run = trained(name, tmp_path, *patterns, "--lora.dropout=0.1")
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    config = json.loads((tmp_path / "peft" / CONFIG_FILE).read_text())
    assert config["target_parameters"] and config["lora_dropout"] == 0.0
    assert "PEFT takes no dropout" in caplog.text
    base = HF_MODELS[name].make()
    untouched = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "peft")
    found, expected = logits(model), logits(run.trainer.model_parts[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=HF_MODELS[name].atol * 3)  # larger logits than there
    # The linears beside the experts matter: without them PEFT's logits are others.
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "lora_B" in key and any(f".{n}." in key for n in ("gate_proj", "up_proj", "down_proj")):
                param.zero_()
    assert (logits(model) - expected).abs().max() > 100 * (found - expected).abs().max()
    assert (found - untouched).abs().max() > 1e-1
    source = [f"--checkpoint.initial_load_path={tmp_path}/base", "--checkpoint.initial_load_in_hf", "--lora.rank=16"]
    start = [*HF_MODELS[name].options[:2], *source, f"--lora.initial_adapter_path={tmp_path}/peft"]
    again = build(tmp_path / "again", *start)
    again.trainer.checkpointer.load()
    assert torch.equal(logits(again.trainer.model_parts[0]), expected)
    for one in (run, again):
        one.trainer.close()


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=160, moe_intermediate_size=48, num_hidden_layers=3, mlp_only_layers=[0, 2],
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, vocab_size=320, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).float().eval()


# PEFT looks for the keys of its patterns among the modules that it adapts, and not among the parameters.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_dense_layers_of_a_live_qwen3_moe_load_in_peft(tmp_path: Path) -> None:
    """From the library, with a rank and an alpha of its own on one of them."""
    model = tiny_qwen3_moe()
    config = LoRAConfig(rank=4, alpha=8.0, rank_pattern={"layers.2.mlp.up_proj": 6}, alpha_pattern={"q_proj": 3.0})
    apply_lora(model, config)
    fill_b(adapter_parameters(model))
    adapter = from_model(model)
    assert sum(name.endswith("_proj.weight") for name in adapter.target_parameters) == 6
    save_peft(adapter, tmp_path / "peft")
    expected = logits(model)
    peft = PeftModel.from_pretrained(tiny_qwen3_moe(), tmp_path / "peft")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-5)
    again = tiny_qwen3_moe()
    apply_lora(again, config)
    into_model(load_peft(tmp_path / "peft"), again)
    assert torch.equal(logits(again), expected)
