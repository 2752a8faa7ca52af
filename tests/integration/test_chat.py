"""`training.dataset = "chat"` through torchtitan's trainer on one rank: what it reads, logs and changes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_job import SMALL, TEMPLATE, chat_job, chat_options
from harness import BASE_CONFIG, ROOT, build, finish, llama3_args, parse, train
from torchtitan.models import llama3
from torchtitan.protocols import train_spec

from lora_converter.chat.crew import Crew
from lora_converter.cli import main
from lora_converter.titan.chat import ChatJob
from lora_converter.titan.phases import full_phase_config

pytestmark = pytest.mark.slow

OURS = "--job.custom_config_module=lora_converter.titan"


def test_a_job_says_what_it_reads_and_logs_epoch_and_trained_tokens(
    chat: Path, dcp_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = build(tmp_path, *chat_job(dcp_base, chat))
    metrics: list[dict] = []
    run.trainer.metrics_processor.logger.log = lambda values, step: metrics.append(values)
    finish(run)
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Chat: 120 conversations"))
    data = r"Chat: 120 conversations, [\d.]+K tokens, \d\d % trained"
    assert re.fullmatch(rf"{data}; \d+ rows of 256, \d\d\.\d % filled; an epoch is \d+ steps", line)
    trained = [int((labels != -100).sum()) for _, labels in run.batches]
    assert [values["chat/trained_tokens"] for values in metrics] == trained and min(trained) > 0
    rows = run.trainer.dataloader.order.rows
    assert [values["chat/epoch"] for values in metrics] == [2 / rows.per_epoch, 4 / rows.per_epoch]
    filled = [sum(int((rows.row(k).documents > 0).sum()) for k in step) / 512 for step in ((0, 1), (2, 3))]
    assert [values["chat/fill"] for values in metrics] == filled and 0.5 < min(filled) < 1


def test_rows_of_one_conversation_are_padded_and_take_no_mask(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *chat_job(dcp_base, chat, "--chat.packing=none"))
    assert run.trainer.model_args.attn_type == "sdpa"
    rows = run.trainer.dataloader.order.rows
    assert rows.per_epoch == 120 and all(len(rows.examples(k)) == 1 for k in range(120))


def test_epochs_set_the_steps(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *chat_job(dcp_base, chat, "--chat.epochs=0.25"))
    rows = run.trainer.dataloader.order.rows.per_epoch
    assert run.trainer.job_config.training.steps == -(-rows // 8) != 2
    finish(run)
    assert len(run.losses) == -(-rows // 8)


def test_all_weights_train_on_conversations_without_adapters(chat: Path, tmp_path: Path) -> None:
    options = [*chat_options(chat), *SMALL, "--checkpoint.initial_load_path=", OURS]
    run = train(tmp_path, *options, config=BASE_CONFIG)
    assert len(run.losses) == 2 and all(p.grad is not None for p in run.trainer.model_parts[0].parameters())


def test_a_spec_of_the_users_own_takes_conversations(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    class Mine(llama3.Transformer):
        pass

    spec = llama3.get_train_spec()
    spec.model_cls = Mine
    train_spec.register_train_spec("mine", spec)
    try:
        run = train(tmp_path, *chat_job(dcp_base, chat, "--model.name=mine", "--checkpoint.load_only"))
    finally:
        del train_spec._extra_train_specs["mine"]
    assert isinstance(run.trainer.model_parts[0], Mine) and len(run.losses) == 2


def test_the_flavor_stays_as_it_was_for_the_next_job(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    before = dict(vars(llama3_args["tiny"]))
    train(tmp_path / "chat", *chat_job(dcp_base, chat))
    assert llama3_args["tiny"].attn_type == before["attn_type"] == "sdpa"
    text = train(tmp_path / "text", f"--checkpoint.initial_load_path={dcp_base}", "--training.steps=1")
    assert type(text.trainer.dataloader).__name__ == "ParallelAwareDataloader"


def test_deterministic_runs_keep_attention_that_trains_on_cpu(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    try:
        run = train(tmp_path, *chat_job(dcp_base, chat, "--debug.deterministic"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(run.losses) == 2


def test_validation_on_conversations_is_for_jobs_on_conversations(tmp_path: Path) -> None:
    config = parse(tmp_path, "--validation.enable", "--validation.dataset=chat")
    with pytest.raises(ValueError, match=r'is for jobs with training\.dataset = "chat"'):
        train_spec.get_train_spec(config.model.name).build_dataloader_fn(
            job_config=config, dp_world_size=1, dp_rank=0, tokenizer=None
        )


def test_the_steps_of_phase_1_are_its_own_whatever_epochs_says(chat: Path, tmp_path: Path) -> None:
    config = parse(tmp_path, "--lora.full_phase.steps=2", *chat_options(chat), "--chat.epochs=3")
    phase = full_phase_config(config)
    spec = train_spec.get_train_spec(phase.model.name)
    ChatJob(phase, spec, Crew())
    assert phase.training.steps == 2 and config.chat.epochs == 3


def test_the_command_makes_the_cache_and_marks_what_is_trained(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(
        '[job]\ncustom_config_module = "lora_converter.titan"\n[model]\nname = "llama3"\nflavor = "debugmodel"\n'
    )
    cache = [f"--chat.cache_path={tmp_path}/cache"]
    assert main(["chat-data", f"{tmp_path}/job.toml", *chat_options(chat), *cache]) == 0
    printed = capsys.readouterr().out
    assert "(on one data-parallel rank: training.global_batch_size is not set)" in printed
    assert printed.startswith("Chat: 120 conversations") and "train.jsonl:1, what is trained is marked:" in printed
    first = json.loads((chat / "train.jsonl").read_text().splitlines()[0])["messages"]
    for message in first:
        marked = f"«{message['content']}<eos>»"
        assert (f"assistant: {marked}" in printed) is (message["role"] == "assistant"), printed
    assert any((tmp_path / "cache").iterdir())


def test_the_day_that_a_template_writes_is_a_setting_and_another_day_is_another_cache(
    chat: Path, tmp_path: Path
) -> None:
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE)
    jobs = []
    for day in ([], ["--chat.date=2024-02-29"]):
        options = [*chat_options(chat), f"--chat.template={tmp_path}/dated.jinja", *day]
        config = parse(tmp_path, "--checkpoint.initial_load_path=", *options)
        jobs.append(ChatJob(config, train_spec.get_train_spec(config.model.name), Crew()).data)
    begins = [data.encoder.decode(data.rows.dataset.example(0)[0].tolist()).splitlines()[0] for data in jobs]
    assert begins == ["01 Jan 2025", "29 Feb 2024"] and jobs[0].cache.folder != jobs[1].cache.folder


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("nowhere.jsonl", "nowhere.jsonl is no file or folder"),
        ("bad.jsonl", "1 of 1 records cannot be used: bad.jsonl:1: "),
        ("train.jsonl", "No example is left of 120 conversations: 120 are too long for {}.seq_len 1 ("),
    ],
)
@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_message_about_files_names_the_setting_that_they_come_from(
    section: str, files: str, told: str, chat: Path, tmp_path: Path
) -> None:
    (chat / "bad.jsonl").write_text("[]\n")
    small = [f"--{section}.seq_len=1"] if files == "train.jsonl" else []
    own = ["--validation.enable", "--validation.dataset=chat", f"--validation.dataset_path={chat}/train.jsonl"]
    wrong = [*chat_options(chat), *own, f"--{section}.dataset_path={chat}/{files}", *small]
    config = parse(tmp_path, "--checkpoint.initial_load_path=", *wrong)
    spec = train_spec.get_train_spec(config.model.name)
    with pytest.raises(ValueError) as error:
        ChatJob(config, spec, Crew()).change(spec, validates=True)
    message = str(error.value)
    assert message.startswith(f"{section}.dataset_path: ") and told.format(section) in message
    assert {"training": "validation.", "validation": "training."}[section] not in message


def test_a_start_from_the_cache_of_a_million_conversations_costs_a_small_part_of_the_imports() -> None:
    """CPU seconds of one process: 0.06 measured, and 0.04 of a launch of the debug model."""
    command = [sys.executable, str(ROOT / "tests/tools/chat_start.py")]
    result = subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "990,049 conversations, 592M tokens" in result.stderr
    assert json.loads(result.stdout)["start / imports"] < 0.2
