"""One tensor, two owners: an output head that is the embedding, and its adapter."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import build, train
from hf_tiny import tiny_qwen3
from peft import PeftModel
from safetensors.torch import load_file
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args
from transformers import AutoModelForCausalLM

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    apply_lora,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from lora_converter.cli import main
from lora_converter.peft import from_model, load_peft, save_peft
from lora_converter.sync import IncrementReceiver, pack

TOKENS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))

qwen3_args["hf_tiny_tied"] = Qwen3ModelArgs(
    vocab_size=320, head_dim=24, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, qk_norm=True, hidden_dim=160,
    rope_theta=1000000.0, norm_eps=1e-6, enable_weight_tying=True,
)  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def adapted_head() -> nn.Module:
    model = tiny_qwen3(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    apply_lora(model, LoRAConfig(rank=3, alpha=6.0, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for number, param in enumerate(adapter_parameters(model).values()):
            param.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return model


def test_merged_for_good_a_live_head_has_a_weight_of_its_own(tmp_path: Path) -> None:
    model = adapted_head()
    expected, embedding = logits(model), model.model.embed_tokens.weight.clone()
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding) and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_what_must_be_taken_back_is_refused_and_names_both_owners() -> None:
    model = adapted_head()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head\.weight is model\.embed_tokens\.weight as well"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="are not merged"):
        unmerge_adapter(model)
    package = pack(model, version=1, base="it")
    receiver = IncrementReceiver(tiny_qwen3(tied=True), base="it")
    plain = copy.deepcopy(receiver.model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head\.weight is model\.embed_tokens\.weight as well"):
        receiver.receive(package)
    for found, expected in ((model.state_dict(), before), (receiver.model.state_dict(), plain)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_any_two_modules_that_share_a_parameter_are_such_owners() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    apply_lora(model, LoRAConfig(rank=2, target_modules=["1"]))
    nn.init.normal_(model[1].lora_b.weight)
    x = torch.randn(2, 6)
    expected = model(x)
    with pytest.raises(ValueError, match=r"1\.weight is 0\.weight as well"):
        merge_adapter(model)
    torch.testing.assert_close(merge_and_unload(model)(x), expected)
    assert model[0].weight is not model[1].weight


@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_merged_offline_the_head_is_untied_and_the_config_says_so(shards: str, tmp_path: Path) -> None:
    model = adapted_head()
    tiny_qwen3(tied=True).save_pretrained(tmp_path / "base", max_shard_size=shards)
    save_peft(from_model(model, base_model=str(tmp_path / "base")), tmp_path / "adapter")
    paths = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *paths, "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


# PEFT warns of merging such an adapter, which changes the embedding there.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_torchtitans_tied_head_trains_exports_and_merges(tmp_path: Path) -> None:
    tiny_qwen3(tied=True).save_pretrained(tmp_path / "base")
    job = [
        *("--model.name=qwen3", "--model.flavor=hf_tiny_tied", "--lora.target_modules=all-linear,output"),
        *(f"--checkpoint.initial_load_path={tmp_path}/base", "--checkpoint.initial_load_in_hf"),
    ]
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged"]
    run = train(tmp_path / "run", *job, *end)
    model = run.trainer.model_parts[0].eval()
    with torch.no_grad():
        expected = model(TOKENS)
    folder = tmp_path / "run" / "checkpoint"
    assert "lm_head" in load_peft(folder / "step-3").factors
    peft = PeftModel.from_pretrained(tiny_qwen3(tied=True), folder / "step-3")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    assert "lm_head.weight" in load_file(folder / "merged-3" / "model.safetensors")
    again = build(tmp_path / "again", *job, f"--lora.initial_adapter_path={folder}/step-3")
    again.trainer.checkpointer.load()
    with torch.no_grad():
        assert torch.equal(again.trainer.model_parts[0].eval()(TOKENS), expected)
    again.trainer.close()
