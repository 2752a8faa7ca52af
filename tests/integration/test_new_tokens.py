"""`lora.new_tokens` in torchtitan's trainer, on one rank."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Run, adapter_state, build, finish, full_state, train
from hf_tiny import tiny_llama
from safetensors.torch import load_file
from test_checkpoint import failing
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.models.llama3 import llama3_args

from lora_converter.chat.folder import add_tokens
from lora_converter.fingerprint import base_fingerprint

FILL = [f"<new {k}>" for k in range(64)]  # behind the tokenizer's 258: 62 have rows in a base of 320, two have none
NEW = "--lora.new_tokens=" + ",".join(["e", *FILL])
ROWS = {"tok_embeddings.lora_token_rows", "output.lora_token_rows"}
SCHEDULE = ["--checkpoint.interval=2", "--lr_scheduler.total_steps=8", "--lr_scheduler.warmup_steps=2"]


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *SCHEDULE]


def model_of(run: Run) -> torch.nn.Module:
    return run.trainer.model_parts[0]


def test_a_piece_of_words_that_trains_cuts_no_word() -> None:
    """Matched as an added token it would be cut out of "theirs", whose ids the base has not learned so."""
    tokenizer = Tokenizer(BPE({"t": 0, "h": 1, "e": 2, "th": 3, "the": 4, "ei": 5, "i": 6}, [("t", "h"), ("th", "e")]))
    before = tokenizer.encode("theiethe").ids
    add_tokens(tokenizer, ["th", "<new>", "<new> 2"])
    assert tokenizer.encode("theiethe").ids == before == [4, 6, 2, 4]
    assert tokenizer.encode("th<new> 2<new>").ids == [3, 8, 7]


@pytest.mark.parametrize("format", ["hf", "dcp"])
def test_rows_are_added_to_the_base_and_they_alone_train(
    format: str, hf_base: Path, dcp_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    base = on(hf_base) if format == "hf" else [f"--checkpoint.initial_load_path={dcp_base}", *SCHEDULE]
    run = build(tmp_path, *base, NEW)
    run.trainer.checkpointer.load()
    before, in_file = full_state(run), load_file(hf_base / "model.safetensors")
    for name, key in (("tok_embeddings", "model.embed_tokens"), ("output", "lm_head")):
        weight, rows = before[f"{name}.weight"], before[f"{name}.lora_token_rows"]
        assert weight.shape == (322, 64) and torch.equal(weight[:320], in_file[f"{key}.weight"])
        assert not weight[320:].any() and not rows[:-2].any()
        mean = in_file[f"{key}.weight"].mean(0)
        torch.testing.assert_close(rows[-2:], mean.expand(2, -1), rtol=0, atol=1e-4)
        assert not torch.equal(rows[-2], rows[-1])
    assert (
        "LoRA: rows of 65 tokens train, 63 of them of the base's 320 rows and 2 new ones; the vocabulary has 322."
        in (caplog.messages)
    )
    tokenizer = run.trainer.tokenizer
    assert tokenizer.encode("a<new 63>e", add_eos=False)[-2:] == [321, tokenizer.token_to_id("e")]
    finish(run)
    moved = {name for name, value in full_state(run).items() if not torch.equal(before[name], value)}
    assert {name for name in moved if "lora_" in name} >= ROWS and not any(n.endswith("s.weight") for n in moved)
    assert all("lora_" in name for name in moved)


def test_a_step_holds_them_and_a_run_goes_on_bit_for_bit(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), NEW, "--lora.train_also_lr=1e-3", "--optimizer.weight_decay=0.1"]
    whole = train(tmp_path / "whole", *options, "--training.steps=4")
    train(tmp_path / "run", *options, "--training.steps=2")
    again = build(tmp_path / "run", *options, "--training.steps=4")
    finish(again)
    assert again.losses == whole.losses[2:]
    expected, found = full_state(whole), full_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    stored = FileSystemReader(tmp_path / "run" / "checkpoint" / "step-2").read_metadata().state_dict_metadata
    assert {
        name for name in stored if not name.startswith("optimizer") and "layers" not in name and "lora" in name
    } == ROWS
    groups = sorted(name for name in stored if "param_groups" in name and name.endswith((".lr", ".weight_decay")))
    own = ("lr", "train_also.lr", "train_also.weight_decay", "weight_decay")
    assert groups == [f"optimizer.param_groups.{name}" for name in own]
    ours = again.trainer.optimizers.optimizers[0].param_groups[1]
    assert (ours["weight_decay"], ours["initial_lr"], len(ours["params"])) == (0.0, 1e-3, 2)


def test_the_fingerprint_is_that_of_the_base_without_more_rows(hf_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path / "more", *on(hf_base), NEW)
    run.trainer.checkpointer.load()
    plain = build(tmp_path / "plain", *on(hf_base))
    plain.trainer.checkpointer.load()
    found = [r.trainer.checkpointer.run.model.base_fingerprint for r in (run, plain)]
    assert found[0] == found[1] == base_fingerprint(model_of(run))
    for each in (run, plain):
        each.trainer.close()


def test_other_tokens_than_the_steps_are_refused_by_name(hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path, *on(hf_base), "--lora.new_tokens=<a>,<b>", "--training.steps=2")
    _, message = failing(tmp_path, *on(hf_base), "--lora.new_tokens=<a>")
    assert "rows of '<a>' (258), '<b>' (259) train there, and of '<a>' (258) here, by lora.new_tokens" in message
    _, message = failing(tmp_path, *on(hf_base), "--lora.new_tokens=<b>,<a>")  # the same ids, each another token
    assert "rows of '<a>' (258), '<b>' (259) train there, and of '<b>' (258), '<a>' (259) here" in message
    _, message = failing(tmp_path, *on(hf_base))
    assert "only there: output, tok_embeddings" in message


def test_a_run_without_new_tokens_is_what_it_was(hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path, *on(hf_base), "--training.steps=2")
    folder = tmp_path / "checkpoint" / "step-2"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert not any("lora_token" in name or "train_also" in name for name in stored)
    old = json.loads((folder / "lora.json").read_text())
    del old["lora"]["new_tokens"], old["tokens"]  # as an older version wrote it
    (folder / "lora.json").write_text(json.dumps(old))
    run = train(tmp_path, *on(hf_base))
    assert type(model_of(run).tok_embeddings) is torch.nn.Embedding
    assert model_of(run).model_args.vocab_size == 320


def test_a_tokenizer_larger_than_the_embedding_makes_it_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    llama3_args["tiny_250"] = replace(llama3_args["tiny"], vocab_size=250)
    model = tiny_llama()
    model.resize_token_embeddings(250)
    model.save_pretrained(tmp_path / "base")
    run = build(tmp_path / "run", *on(tmp_path / "base"), "--model.flavor=tiny_250")
    run.trainer.checkpointer.load()
    assert model_of(run).tok_embeddings.weight.shape[0] == model_of(run).vocab_size == 258
    assert adapter_state(run).keys() >= ROWS
    assert "8 new ones; the vocabulary has 258" in caplog.text
    finish(run)


def test_a_random_base_has_random_rows(tmp_path: Path) -> None:
    options = ["--checkpoint.initial_load_path=", *SCHEDULE, NEW]
    whole = train(tmp_path / "whole", *options, "--training.steps=4")
    train(tmp_path / "run", *options, "--training.steps=2")
    again = train(tmp_path / "run", *options, "--training.steps=4")
    assert again.losses == whole.losses[2:]


def test_weights_in_bf16_keep_rows_in_fp32(hf_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *on(hf_base), NEW, "--training.dtype=bfloat16")
    assert model_of(run).tok_embeddings.weight.dtype is torch.bfloat16
    assert all(adapter_state(run)[name].dtype is torch.float32 for name in ROWS)


def test_the_loss_takes_the_head_in_chunks_as_it_does_over_logits(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chunks = train(tmp_path / "chunks", *on(hf_base), NEW, "--lora.loss_chunk_tokens=24")
    assert "LoRA: the loss takes the frozen output head, 24 tokens at a time." in caplog.messages
    logits = train(tmp_path / "logits", *on(hf_base), NEW, "--lora.loss_chunk_tokens=0")
    assert chunks.losses == pytest.approx(logits.losses, rel=1e-6)
    expected = adapter_state(logits)
    for name, value in adapter_state(chunks).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora.new_tokens=<a>", "--lora.target_modules=output"],
            "output is to have an adapter, and rows of its own",
        ),
    ],
)
def test_what_cannot_train_is_refused(options: list[str], message: str, hf_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        build(tmp_path, *on(hf_base), *options)
    assert message in str(error.value)
