"""Conversations for torchtitan 0.3, against transformers with one conversation at a time and against one rank."""

import json
from pathlib import Path
from typing import Any

import chat03
import jobs03
import pytest
import torch
import torch.nn.functional as F
from chat03 import ROWS, chat_config, make_files, reference
from hf_tiny import tiny_llama
from launch import launch
from tokenizers import Tokenizer
from torch.nn.attention.flex_attention import create_mask

from lora_converter.titan03 import chat


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and conversations; what layouts are compared with is kept beside them."""
    folder = tmp_path_factory.mktemp("chat03")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def verdicts(files: Path) -> dict[str, Any]:
    for options in ({}, chat03.ONE_PER_ROW):
        reference(files, **options)
    (files / "two").mkdir()
    return launch("../titan03/chat03.py", ranks=2, folder=files / "two", checks=list(chat03.CHECKS))


@pytest.mark.parametrize("claim", list(chat03.CHECKS))
def test_conversations_are_the_same_on(verdicts: dict[str, Any], claim: str) -> None:
    assert not verdicts[claim]["error"], verdicts[claim]["error"]


def test_the_loss_of_a_step_is_that_of_transformers_over_its_conversations(files: Path, tmp_path: Path) -> None:
    """One conversation at a time; what is trained is found in the text: the assistant's words and their end token."""
    run = jobs03.train(chat_config(tmp_path, files, training__steps=1))
    rows, lines = run.trainer.dataloader.order.rows, (files / "chat" / "train.jsonl").read_text().splitlines()
    tokenizer = Tokenizer.from_file(str(files / "chat" / "tokenizer" / "tokenizer.json"))
    tokenizer.post_processor = None
    model, total, trained = tiny_llama(), 0.0, 0
    examples = [number for k in range(ROWS) for number in rows.examples(k)]
    for number in examples:
        line = int(rows.dataset.where(number).rpartition(":")[2])
        text, spans = "<bos>", []
        for message in json.loads(lines[line - 1])["messages"]:
            text += f"{message['role']}: "
            begin = len(text)
            text += f"{message['content']}<eos>"
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
            text += "\n"
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor(encoded.ids)
        inside = [any(b <= at and end <= e for b, e in spans) for at, end in encoded.offsets]
        labels = torch.where(torch.tensor(inside), ids, -100)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        trained += int((labels[1:] != -100).sum())
    assert len(examples) > ROWS and trained > 100
    assert run.losses[0] == pytest.approx(total / trained, rel=1e-6)  # fp32: sums in another order


@pytest.mark.parametrize("rows", [1, 3])
def test_the_mask_that_torchtitan_makes_of_positions_is_that_of_documents(
    rows: int, files: Path, tmp_path: Path
) -> None:
    sizes = dict(training__local_batch_size=rows, training__global_batch_size=rows)
    run = jobs03.build(chat_config(tmp_path, files, **sizes))
    order = run.trainer.dataloader.order
    batch = next(order)
    documents = torch.from_numpy(batch.documents)
    length = documents.shape[1]
    mask = run.trainer.model_parts[0].get_attention_masks(positions=torch.from_numpy(batch.positions))
    found = create_mask(mask.mask_mod, rows, 1, length, length, device="cpu")[:, 0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(found, causal & (documents[:, :, None] == documents[:, None, :]))
    assert documents.max() > 1 and (documents == 0).any()
    run.trainer.close()


def test_epochs_set_the_steps_of_the_trainer_the_schedule_and_the_run(files: Path, tmp_path: Path) -> None:
    run = jobs03.build(chat_config(tmp_path, files, chat__epochs=1.5))
    trainer, per_epoch = run.trainer, run.trainer.dataloader.order.rows.per_epoch
    steps = -(-3 * per_epoch // (2 * ROWS))
    assert trainer.config.training.steps == trainer.checkpointer.run.job.steps == steps != chat03.STEPS
    rates = []
    for _ in range(steps):
        trainer.lr_schedulers.step()
        rates.append(trainer.lr_schedulers.schedulers[0].get_last_lr()[0])
    assert rates[-2] > 0 == rates[-1]
    trainer.close()


def test_metrics_count_what_was_read(files: Path, tmp_path: Path) -> None:
    run = jobs03.build(chat_config(tmp_path, files))
    logged: list[dict[str, float]] = []
    logger = run.trainer.metrics_processor.logger
    logger.log = lambda metrics, step: logged.append(metrics)  # type: ignore[method-assign]
    batches, _ = chat03.watch(run)
    jobs03.finish(run)
    labels = torch.stack(batches)[:, :, 2]
    assert [m["chat/trained_tokens"] for m in logged] == (labels != -100).flatten(1).sum(1).tolist()
    assert logged[-1]["chat/epoch"] == chat03.STEPS * ROWS / run.trainer.dataloader.order.rows.per_epoch
    assert 0.5 < logged[0]["chat/fill"] <= 1


def test_validation_may_have_files_of_its_own_and_a_job_may_have_no_adapters(files: Path, tmp_path: Path) -> None:
    whole = chat_config(tmp_path / "a", files, chat__validation_split=0.0, **chat03.VALIDATION, training__steps=1)
    whole.validator.dataloader = type(whole.dataloader)(dataset_path=str(files / "chat" / "train.jsonl"))
    host = jobs03.host_config(
        tmp_path / "b",
        hf_assets_path=whole.hf_assets_path,
        training=whole.training,
        checkpoint=whole.checkpoint,
        validator=whole.validator,
    )
    without = chat(host, whole.dataloader.dataset_path, cache_path=str(files / "chat" / "cache"))
    found = []
    for config in (whole, without):
        run = jobs03.build(config)
        _, validated = chat03.watch(run)
        run.trainer.checkpointer.load()
        run.trainer.validator.validate(run.trainer.model_parts, 0)
        found += validated
        run.trainer.close()
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found) == 2


def test_a_base_that_never_learned_the_end_token_is_told_of(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    tokenizer = Tokenizer.from_file(str(files / "chat" / "tokenizer" / "tokenizer.json"))
    model.lm_head.weight.data[tokenizer.token_to_id("<eos>")] = 0
    model.save_pretrained(tmp_path / "base")
    for base, told in ((files / "base", False), (tmp_path / "base", True)):
        caplog.clear()
        run = jobs03.build(chat_config(tmp_path / "run", files, checkpoint__initial_load_path=str(base)))
        run.trainer.checkpointer.load()
        run.trainer.close()
        warned = [record.getMessage() for record in caplog.records if "untrained rows" in record.getMessage()]
        assert len(warned) == told and all("the base's lm_head has untrained rows for '<eos>'" in w for w in warned)
