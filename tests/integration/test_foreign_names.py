"""Adapters from elsewhere that bring copies of base weights, or name the modules of another model."""

import logging
from pathlib import Path

import pytest
import torch
from harness import build
from safetensors.torch import load_file, save_file
from test_foreign_folders import TOKENS, logits, on, peft_adapter
from transformers import AutoModelForCausalLM

from lora_converter.merge import merge_directories
from lora_converter.peft import WEIGHTS_FILE


@pytest.mark.parametrize("changed", [False, True])
def test_copies_of_base_weights_are_dropped_where_they_are_the_bases_and_else_refused_in_training(
    changed: bool, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = AutoModelForCausalLM.from_pretrained(hf_base, dtype=torch.float32, attn_implementation="eager")
    if changed:
        with torch.no_grad():
            model.lm_head.weight[3] += 1.0
    expected = peft_adapter(tmp_path / "adapter", hf_base, model=model, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    start = [*on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter"]
    run = build(tmp_path / "run", *start, "--lora.rank=16")
    if changed:
        with pytest.raises(ValueError, match=r"brings output\.weight of another base than this one.*Merge it first"):
            run.trainer.checkpointer.load()
    else:
        run.trainer.checkpointer.load()
        with torch.no_grad():
            found = run.trainer.model_parts[0].eval()(TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert "output.weight of" in caplog.text and "are the base's own, and dropped" in caplog.text
    run.trainer.close()
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers", "layers"])
def test_an_adapter_of_a_larger_model_or_a_smaller_one_is_read(prefix: str, hf_base: Path, tmp_path: Path) -> None:
    expected = peft_adapter(tmp_path / "adapter", hf_base)
    renamed(tmp_path / "adapter", "base_model.model.model.layers", f"base_model.model.{prefix}")
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    run = build(tmp_path / "run", *on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter", "--lora.rank=16")
    run.trainer.checkpointer.load()
    with torch.no_grad():
        found = run.trainer.model_parts[0].eval()(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    run.trainer.close()


def test_a_part_that_the_base_has_not_is_not_taken_for_another(hf_base: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    renamed(tmp_path / "adapter", "base_model.model.model.layers", "base_model.model.vision_tower.layers")
    with pytest.raises(ValueError, match=r"vision_tower\.layers\.0\.self_attn\.q_proj\.weight is not in the base"):
        merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")


def test_a_name_that_may_be_several_is_an_error_with_the_candidates(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weights = {f"{part}.layers.0.q_proj.weight": torch.zeros(4, 4) for part in ("model", "text_model")}
    save_file(weights, base / "model.safetensors")
    from lora_converter.peft import PeftAdapter, save_peft

    factors = {"transformer.layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))}
    save_peft(PeftAdapter(factors, 1, 1.0, 0.0, False, ["q_proj"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"may be any of model\.layers\.0\.q_proj, text_model\.layers\.0\.q_proj"):
        merge_directories(base, tmp_path / "adapter", tmp_path / "merged")


# Ranks and alphas of single linears, through the trainer
