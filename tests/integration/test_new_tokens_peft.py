"""Rows of new tokens as PEFT's trainable tokens: written, read and merged, with PEFT itself as reference."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from harness import ROOT, Run, adapter_state, build, train
from hf_tiny import tiny_llama, tiny_qwen3
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_tied_heads import qwen3_args  # noqa: F401  with the tied flavor
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_converter import LoRAConfig, apply_lora
from lora_converter.cli import main
from lora_converter.inspect import describe_adapter
from lora_converter.peft import from_model, into_model, load_peft, save_peft

FILL = [f"<new {k}>" for k in range(64)]
NEW = "--lora.new_tokens=" + ",".join(["$", *FILL])
END = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged", "--optimizer.lr=5e-3"]
TOKENS = torch.tensor([[5, 320, 17, 258, 321, 9, 40, 300]])


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def of_run(run: Run) -> torch.Tensor:
    with torch.no_grad():
        return run.trainer.model_parts[0].eval()(TOKENS)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def resized(model: nn.Module, rows: int = 322) -> nn.Module:
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture(scope="module", params=["untied", "tied"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, bool]:
    """Options of a job, its base's folder, and whether that is tied. The folder has a tokenizer, as models have."""
    folder, tied = tmp_path_factory.mktemp("base") / "base", request.param == "tied"
    (tiny_qwen3(tied=True) if tied else tiny_llama()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "tests/assets/tokenizer" / name).read_bytes())
    model = ["--model.name=qwen3", "--model.flavor=hf_tiny_tied"] if tied else []
    return [*model, f"--model.hf_assets_path={folder}", *on(folder)], folder, tied


def test_a_run_is_read_by_peft_and_merged_and_goes_on(job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options, base, tied = job
    caplog.set_level(logging.WARNING)
    run = train(tmp_path / "run", *options, NEW, *END)
    expected, folder = of_run(run), tmp_path / "run" / "checkpoint"
    assert "vLLM 0.33 takes no such adapter: `lora-converter merge`" in caplog.text
    assert "model.resize_token_embeddings(322)" in caplog.text
    config = json.loads((folder / "step-3" / "adapter_config.json").read_text())
    assert (
        list(config["trainable_token_indices"]) == ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    )
    assert "model.embed_tokens  65 x 64, rows of single tokens" in describe_adapter(load_peft(folder / "step-3"))
    peft = PeftModel.from_pretrained(
        resized(type(tiny_qwen3(tied=True) if tied else tiny_llama()).from_pretrained(base)), folder / "step-3"
    )
    torch.testing.assert_close(logits(peft), expected, rtol=1e-5, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    assert merged.config.vocab_size == 322 and merged.config.tie_word_embeddings == tied
    theirs = peft.merge_and_unload()
    torch.testing.assert_close(merged.lm_head.weight, theirs.lm_head.weight, rtol=0, atol=1e-6)
    for where in ("step-3", "merged-3"):
        tokenizer = AutoTokenizer.from_pretrained(folder / where)
        assert len(tokenizer) == 322 and tokenizer.convert_tokens_to_ids(["<new 0>", "<new 63>"]) == [258, 321]
        assert tokenizer.decode(tokenizer("a<new 63>").input_ids, skip_special_tokens=True).endswith("a<new 63>")
    new_base = [f"--model.hf_assets_path={folder}/merged-3", *on(folder / "merged-3")]
    on_merged = build(tmp_path / "next", *options, *new_base, "--lora.target_modules=wq")
    on_merged.trainer.checkpointer.load()  # a base with more rows than the flavor, all of them frozen
    torch.testing.assert_close(of_run(on_merged), expected, rtol=1e-5, atol=1e-4)
    assert not [name for name in adapter_state(on_merged) if "lora_token_rows" in name]
    on_merged.trainer.close()
    again = build(tmp_path / "again", *options, NEW, f"--lora.initial_adapter_path={folder}/step-3")
    again.trainer.checkpointer.load()
    torch.testing.assert_close(of_run(again), expected, rtol=1e-5, atol=1e-5)
    again.trainer.close()
    other = build(tmp_path / "other", *options, f"--lora.initial_adapter_path={folder}/step-3")
    with pytest.raises(ValueError, match=r"Set lora\.new_tokens = \[\"\$\", \"<new 0>\", "):
        other.trainer.checkpointer.load()
    other.trainer.close()


def test_a_step_folder_is_exported_with_the_rows_of_its_base(job, tmp_path: Path) -> None:
    options, base, _ = job
    run = train(tmp_path / "run", *options, NEW, "--optimizer.lr=5e-3")
    assert main(["export", "--checkpoint", f"{tmp_path}/run/checkpoint/step-3", "--output", f"{tmp_path}/out"]) == 0
    model = resized(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path / "out")), of_run(run), rtol=1e-5, atol=1e-4
    )


def test_an_exported_step_has_the_tokenizer_and_its_merge_knows_the_tokens(
    job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, base, _ = job
    train(tmp_path / "run", *options, NEW)
    step = f"{tmp_path}/run/checkpoint/step-3"
    assert main(["export", "--checkpoint", step, "--output", f"{tmp_path}/a"]) == 0
    assert main(["merge", "--base", f"{base}", "--adapter", f"{tmp_path}/a", "--output", f"{tmp_path}/m"]) == 0
    for where in ("a", "m"):
        assert AutoTokenizer.from_pretrained(tmp_path / where)("<new 63>$").input_ids[-2:] == [321, 5]
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = Tokenizer.from_file(f"{base}/tokenizer.json")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save(f"{other}/tokenizer.json")
    assert main(["export", "--checkpoint", step, "--base", f"{other}", "--output", f"{tmp_path}/b"]) == 0
    assert "no tokenizer with the new tokens is written" in caplog.text
    assert not (tmp_path / "b" / "tokenizer.json").exists() and (tmp_path / "b" / "adapter_config.json").exists()


def test_a_step_with_a_random_base_is_exported_with_the_rows_that_it_stores(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--checkpoint.initial_load_path=", NEW)
    step = f"{tmp_path}/run/checkpoint/step-3"
    assert main(["export", "--checkpoint", step, "--output", f"{tmp_path}/a"]) == 0
    rows = load_peft(tmp_path / "a").token_rows["lm_head"].rows
    torch.testing.assert_close(rows, run.trainer.model_parts[0].output.whole_rows(), rtol=0, atol=1e-6)


def made_by_peft(
    model: nn.Module, folder: Path, *, tied: bool = False, rows: Any = None, save_embedding_layers: bool = False
) -> torch.Tensor:
    """An adapter that PEFT writes, everything that trains away from where it began. Returns its logits.

    Args:
        rows: Its `trainable_token_indices`.
        save_embedding_layers: PEFT's own choice, after the base has been resized, is True.
    """
    ids = [321, 7, 320]  # in no order
    rows = rows or (ids if tied else {"embed_tokens": ids, "lm_head": ids})
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=rows)
    peft = get_peft_model(resized(model), settings)
    with torch.no_grad():
        for number, param in enumerate(p for p in peft.parameters() if p.requires_grad):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    peft.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return logits(peft)


THERE = [300, 258, 321, *range(259, 300), *range(301, 321), 5]  # those of NEW, in no order


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("rows", ["both", "embedding", "different"])
def test_peft_directories_start_runs_and_are_merged(rows: str, whole: bool, job, tmp_path: Path) -> None:
    """PEFT stores the whole embedding and head beside trained rows, once the vocabulary was resized."""
    options, base, tied = job
    if (rows == "different" and tied) or (rows == "embedding" and not tied and not whole):
        return  # PEFT has no rows of a tied head's own; and there it stores nothing of the head's new rows
    ids = {
        "both": {"embed_tokens": THERE, "lm_head": THERE},
        "embedding": THERE,
        "different": {"embed_tokens": THERE[:-1], "lm_head": THERE},
    }
    model = resized(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    expected = made_by_peft(model, tmp_path / "a", rows=ids[rows], save_embedding_layers=whole)
    assert main(["merge", "--base", f"{base}", "--adapter", f"{tmp_path}/a", "--output", f"{tmp_path}/m"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    assert merged.config.tie_word_embeddings == tied
    run = build(tmp_path / "run", *options, NEW, f"--lora.initial_adapter_path={tmp_path}/a", "--lora.rank=3")
    run.trainer.checkpointer.load()
    torch.testing.assert_close(of_run(run), expected, rtol=1e-5, atol=1e-4)
    run.trainer.close()
    live = type(tiny_qwen3(tied=True) if tied else tiny_llama()).from_pretrained(base)
    apply_lora(live, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]), tokens=THERE)
    into_model(load_peft(tmp_path / "a"), live)
    torch.testing.assert_close(logits(live), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rows", [[7, 300], [7, 320, 321]])
def test_a_tied_head_that_the_base_stores_too_stays_the_embedding(rows: list[int], tmp_path: Path) -> None:
    """transformers ties none to an embedding that is stored beside it with other values."""
    tiny_qwen3(tied=True).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = resized(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    expected = made_by_peft(model, tmp_path / "a", rows=rows)
    assert main(["merge", "--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/a", "--output", f"{tmp_path}/m"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    size = merged.config.vocab_size
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and size == max(320, rows[-1] + 1)
    tokens = TOKENS % size
    with torch.no_grad():
        found = merged.eval()(tokens).logits
    if size == 322:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    else:
        live = tiny_qwen3(tied=True)
        apply_lora(live, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]), tokens=rows)
        into_model(load_peft(tmp_path / "a"), live)
        with torch.no_grad():
            torch.testing.assert_close(found, live.eval()(tokens).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_of_a_tied_head_alone_are_refused_where_it_has_none(tmp_path: Path) -> None:
    tiny_qwen3(tied=True).save_pretrained(tmp_path / "base")
    made_by_peft(tiny_qwen3(tied=True), tmp_path / "a", rows={"lm_head": [5]})
    run = build(
        tmp_path / "run",
        "--model.name=qwen3",
        "--model.flavor=hf_tiny_tied",
        *on(tmp_path / "base"),
        "--lora.new_tokens=$",
        "--lora.rank=3",
        "--lora.alpha=6",
        f"--lora.initial_adapter_path={tmp_path}/a",
    )
    with pytest.raises(ValueError, match="has trained rows of tokens of lm_head alone, which is no weight of its own"):
        run.trainer.checkpointer.load()
    run.trainer.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_writes_is_merged_as_peft_computes_it(job, tmp_path: Path) -> None:
    _, base, tied = job
    expected = made_by_peft(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "a", tied=tied)
    assert main(["merge", "--base", f"{base}", "--adapter", f"{tmp_path}/a", "--output", f"{tmp_path}/m"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) != tied


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_live_models_exchange_them_with_peft(tied: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_qwen3(tied=True) if tied else tiny_llama()

    expected = made_by_peft(make(), tmp_path / "a", tied=tied)
    model = make()
    apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]), tokens=[7, 320, 321])
    into_model(load_peft(tmp_path / "a"), model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    save_peft(from_model(model), tmp_path / "b")
    back = PeftModel.from_pretrained(resized(make()), tmp_path / "b")
    torch.testing.assert_close(logits(back), expected, rtol=1e-5, atol=1e-5)
    other = make()
    apply_lora(other, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]), tokens=[7])
    with pytest.raises(ValueError, match=r"give apply_lora tokens = \[7, 320, 321\]"):
        into_model(load_peft(tmp_path / "a"), other)
