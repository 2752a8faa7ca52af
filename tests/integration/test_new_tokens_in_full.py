"""New tokens for an embedding and a head that `train_also` names: all of their rows train, the added ones too."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import Run, build, full_state, train
from hf_tiny import tiny_llama, tiny_qwen3
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_new_tokens_peft import END, NEW, job, logits, of_run, resized  # noqa: F401  the fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_converter import LoRAConfig, apply_lora
from lora_converter.adapters import reset_adapters
from lora_converter.peft import from_model, into_model, load_peft, save_peft


def in_full(tied: bool) -> str:
    return "--lora.train_also=tok_embeddings,norm" if tied else "--lora.train_also=tok_embeddings,output"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about tied heads
def test_a_run_begins_at_the_base_and_its_mean_and_goes_through_peft_and_merging(job, tmp_path: Path) -> None:  # noqa: F811
    options, base, tied = job
    start = build(tmp_path / "start", *options, NEW, in_full(tied))
    start.trainer.checkpointer.load()
    begun = full_state(start)["tok_embeddings.weight"]
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(begun[:320], stored) and begun.shape[0] == 322
    # transformers' rows are the mean and noise of 1e-9 of the covariance, 3e-5 of a row's size.
    torch.testing.assert_close(begun[320:], stored.mean(0).expand(2, -1), rtol=0, atol=2e-4 * stored.std().item())
    assert not torch.equal(begun[320], begun[321])
    start.trainer.close()
    run = train(tmp_path / "run", *options, NEW, in_full(tied), *END)
    expected, folder = of_run(run), tmp_path / "run" / "checkpoint"
    moved = (of_weights(run, tied) - of_weights(start, tied)).abs().amax(1)
    assert (moved > 0).all()  # of a head every row, the added ones too, has a gradient in each step
    config = json.loads((folder / "step-3" / "adapter_config.json").read_text())
    assert "model.embed_tokens" in config["modules_to_save"] and "trainable_token_indices" not in config
    peft = PeftModel.from_pretrained(
        resized(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)), folder / "step-3"
    )
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    assert merged.config.vocab_size == 322 and len(AutoTokenizer.from_pretrained(folder / "merged-3")) == 322
    again = build(tmp_path / "again", *options, NEW, in_full(tied), f"--lora.initial_adapter_path={folder}/step-3")
    again.trainer.checkpointer.load()
    torch.testing.assert_close(of_run(again), expected, rtol=1e-5, atol=1e-5)
    again.trainer.close()


def of_weights(run: Run, tied: bool) -> torch.Tensor:
    return full_state(run)["tok_embeddings.weight" if tied else "output.weight"]


def test_a_step_goes_on_bit_for_bit(job, tmp_path: Path) -> None:  # noqa: F811
    options, _, tied = job
    options = [*options, NEW, in_full(tied), "--checkpoint.interval=2", "--lr_scheduler.total_steps=8"]
    whole = train(tmp_path / "whole", *options, "--training.steps=4")
    train(tmp_path / "run", *options, "--training.steps=2")
    assert train(tmp_path / "run", *options, "--training.steps=4").losses == whole.losses[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_live_model_is_the_one_that_peft_makes(tied: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_qwen3(tied=True) if tied else tiny_llama()

    model, saved = make(), ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"], train_also=saved)
    apply_lora(model, config, tokens=[321])
    weight = model.get_input_embeddings().weight
    assert weight.requires_grad and weight.shape[0] == 322
    before = weight.detach().clone()
    reset_adapters(model, seed=0)
    assert torch.equal(weight, before)  # what trains in full is no adapter, and is not reset
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
    theirs = get_peft_model(resized(make()), settings)
    theirs.save_pretrained(tmp_path / "a")
    into_model(load_peft(tmp_path / "a"), model)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    save_peft(from_model(model), tmp_path / "b")
    back = PeftModel.from_pretrained(resized(make()), tmp_path / "b")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_directory_of_the_same_ids_for_other_tokens_is_refused(job, tmp_path: Path) -> None:  # noqa: F811
    """All rows are in it, and only its tokenizer tells which tokens' they are."""
    options, _, tied = job
    train(tmp_path / "run", *options, NEW, in_full(tied), *END, "--training.steps=1")
    start = f"--lora.initial_adapter_path={tmp_path}/run/checkpoint/step-1"
    swapped = NEW.replace("<new 62>,<new 63>", "<new 63>,<new 62>")
    other = build(tmp_path / "other", *options, swapped, in_full(tied), start)
    with pytest.raises(ValueError, match=r'Set lora\.new_tokens = .*"<new 62>", "<new 63>"\]'):
        other.trainer.checkpointer.load()
    other.trainer.close()
