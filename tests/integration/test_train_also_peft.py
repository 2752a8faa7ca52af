"""Modules that train in full as PEFT's `modules_to_save`: written, read and merged, with PEFT itself as reference."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import Run, adapter_state, build, train
from hf_tiny import tiny_llama, tiny_qwen3
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_tied_heads import TOKENS, logits
from transformers import AutoModelForCausalLM

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, merge_and_unload, unload_adapter
from lora_converter.cli import main
from lora_converter.inspect import describe_adapter
from lora_converter.peft import from_model, into_model, load_peft, save_peft
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack

IN_FULL = "--lora.train_also=tok_embeddings,output,norm,layers.*.ffn_norm"
SAVED = [
    "lm_head",
    "model.embed_tokens",
    *(f"model.layers.{n}.post_attention_layernorm" for n in range(4)),
    "model.norm",
]
END = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged", "--optimizer.lr=5e-3"]


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def of_run(run: Run) -> torch.Tensor:
    with torch.no_grad():
        return run.trainer.model_parts[0].eval()(TOKENS)


def test_a_run_is_read_by_peft_and_merged_and_goes_on(hf_base: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    run = train(tmp_path / "run", *on(hf_base), IN_FULL, *END)
    expected, folder = of_run(run), tmp_path / "run" / "checkpoint"
    assert "vLLM 0.33 takes no such adapter" in caplog.text
    assert load_peft(folder / "step-3").modules_to_save == SAVED
    assert "model.norm.weight  64, trained in full" in describe_adapter(load_peft(folder / "step-3"))
    peft = PeftModel.from_pretrained(tiny_llama(), folder / "step-3")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-4)
    assert (logits(tiny_llama()) - expected).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    # The directory says what trained in full.
    again = build(tmp_path / "again", *on(hf_base), f"--lora.initial_adapter_path={folder}/step-3")
    again.trainer.checkpointer.load()
    assert torch.equal(of_run(again), expected) and "norm.weight" in adapter_state(again)
    again.trainer.close()
    other = build(
        tmp_path / "other", *on(hf_base), f"--lora.initial_adapter_path={folder}/step-3", "--lora.train_also=norm"
    )
    with pytest.raises(ValueError, match=r"6 modules train in full only there, by lora\.train_also: layers\.0\.ffn"):
        other.trainer.checkpointer.load()
    other.trainer.close()


def test_a_step_folder_is_exported_with_them(hf_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *on(hf_base), IN_FULL, "--optimizer.lr=5e-3")
    assert main(["export", "--checkpoint", f"{tmp_path}/run/checkpoint/step-3", "--output", f"{tmp_path}/out"]) == 0
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(peft), of_run(run), rtol=1e-5, atol=1e-4)


# PEFT warns of such adapters.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("named", ["tok_embeddings", "output"])
def test_a_tied_weight_is_written_under_both_names(named: str, tmp_path: Path) -> None:
    tiny_qwen3(tied=True).save_pretrained(tmp_path / "base")
    job = ["--model.name=qwen3", "--model.flavor=hf_tiny_tied", *on(tmp_path / "base"), f"--lora.train_also={named}"]
    run = train(tmp_path / "run", *job, *END)
    expected, folder = of_run(run), tmp_path / "run" / "checkpoint"
    assert load_peft(folder / "step-3").modules_to_save == ["lm_head", "model.embed_tokens"]
    peft = PeftModel.from_pretrained(tiny_qwen3(tied=True), folder / "step-3")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    again = build(tmp_path / "again", *job, f"--lora.initial_adapter_path={folder}/step-3")
    again.trainer.checkpointer.load()
    assert torch.equal(of_run(again), expected)
    again.trainer.close()


def made_by_peft(model: nn.Module, folder: Path, saved: list[str], rank: int = 3) -> torch.Tensor:
    """An adapter that PEFT writes, with everything that trains away from where it began. Returns its logits."""
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        for number, param in enumerate(p for p in peft.parameters() if p.requires_grad):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    peft.save_pretrained(folder)
    return logits(peft)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tied", "saved"),
    [(False, ["norm"]), (False, ["lm_head", "embed_tokens"]), (True, ["embed_tokens"]), (True, ["lm_head"])],
)
def test_what_peft_writes_is_merged_as_peft_computes_it(tied: bool, saved: list[str], tmp_path: Path) -> None:
    tiny_qwen3(tied=tied).save_pretrained(tmp_path / "base")
    expected = made_by_peft(tiny_qwen3(tied=tied), tmp_path / "adapter", saved)
    paths = ["--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/adapter", "--output", f"{tmp_path}/merged"]
    assert main(["merge", *paths]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.vocab_size == 320


def live(patterns: list[str]) -> nn.Module:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(rank=3, alpha=6.0, target_modules=["q_proj"], train_also=patterns))
    return model


def test_a_live_model_reads_and_writes_them(tmp_path: Path) -> None:
    expected = made_by_peft(tiny_llama(), tmp_path / "theirs", ["norm", "lm_head"])
    model = live(["*norm", "lm_head"])
    into_model(load_peft(tmp_path / "theirs"), model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    save_peft(from_model(model), tmp_path / "ours")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"The adapter brings .* of another base than this one"):
        into_model(load_peft(tmp_path / "theirs"), live(["lm_head"]))
    receiver = AdapterReceiver(live(["*norm", "lm_head"]), base="it")
    receiver.receive(pack(model, version=1, base="it"))
    assert torch.equal(logits(receiver.model), logits(model))
    with pytest.raises(ValueError, match="trained in full, which is no increment"):
        IncrementReceiver(tiny_llama(), base="it").receive(pack(model, version=1, base="it"))
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not adapter_parameters(model) and not any(p.requires_grad for p in model.parameters())
    unload_adapter(receiver.model)
    assert not adapter_parameters(receiver.model)


def test_a_file_without_what_it_lists_is_refused(tmp_path: Path) -> None:
    made_by_peft(tiny_llama(), tmp_path, ["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "lm_head" not in key}, path)
    with pytest.raises(ValueError, match=r"nothing of modules_to_save = \['lm_head'\] is in it"):
        load_peft(tmp_path)


def test_a_run_starts_from_what_peft_wrote_and_may_train_more_beside(hf_base: Path, tmp_path: Path) -> None:
    """PEFT's own directories know of no fingerprint, by which weights that train are left out."""
    expected = made_by_peft(tiny_llama(), tmp_path / "adapter", ["model.norm"], rank=16)
    start = [*on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter"]
    for more in ([], ["--lora.train_also=norm,output"]):
        run = build(tmp_path / f"run{len(more)}", *start, "--lora.rank=16", *more)
        run.trainer.checkpointer.load()
        torch.testing.assert_close(of_run(run), expected, rtol=1e-5, atol=1e-4)
        assert ("output.weight" in adapter_state(run)) == bool(more)
        run.trainer.close()
