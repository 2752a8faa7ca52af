"""Conversations that are refused, or a job on them: what the message says is done, and it trains."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_job import TEMPLATE, chat_options, conversation
from harness import BASE_CONFIG, Run, build, parse, train
from test_remedies_of_runs import goes_on
from test_resume import EVERY_STEP, on, step
from torchtitan.models.llama3 import llama3_args
from transformers import AutoTokenizer

from lora_converter.chat.folder import open_tokenizer
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.reading import find_files
from lora_converter.cli import main
from lora_converter.titan.documents import flex_arguments

pytestmark = pytest.mark.slow

SMALL = ("--training.local_batch_size=2", "--validation.local_batch_size=2", "--validation.steps=1")
VALIDATES = ("--validation.enable", "--validation.freq=1")


@pytest.fixture
def job(hf_base: Path, tmp_path: Path) -> list[str]:
    """Options of a job whose files are under `tmp_path / "chat"`."""
    return [*on(hf_base), *chat_options(tmp_path / "chat", count=40), *SMALL]


def refused(message: str, *options: str, folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        build(folder, *options)
    assert message in str(error.value)


# The files


def test_a_job_trains_once_bad_records_are_removed(job: list[str], tmp_path: Path) -> None:
    """The error has them all, so that one correction is enough."""
    data = tmp_path / "chat" / "train.jsonl"
    good = data.read_text()
    data.write_text("[]\n" + good + json.dumps({"instruction": "a", "output": "b", "history": [["c", "d"]]}) + "\n")
    refused("2 of 42 records cannot be used: train.jsonl:1: ", *job, folder=tmp_path / "run")
    refused("history is not read. Write earlier turns as messages", *job, folder=tmp_path / "run")
    refused("Correct or remove them.", *job, folder=tmp_path / "run")
    turns = [dict(role=role, content=text) for role, text in zip(("user", "assistant") * 2, "cdab", strict=True)]
    data.write_text(good + json.dumps({"messages": turns}) + "\n")
    assert len(goes_on(tmp_path / "run", *job).losses) == 3


def test_a_file_of_another_kind_is_given_as_one_that_is_read(job: list[str], tmp_path: Path) -> None:
    text = (tmp_path / "chat" / "train.jsonl").rename(tmp_path / "chat" / "train.txt")
    named = f"--training.dataset_path={text}"
    refused("train.txt is of another kind. Give .jsonl, .json (one object per line)", *job, named, folder=tmp_path)
    refused("set training.dataset_path to files of conversations.", *job, "--training.dataset_path=", folder=tmp_path)
    text.rename(text.with_suffix(".jsonl"))
    goes_on(tmp_path / "run", *job)


def test_a_file_that_changed_while_it_was_read_is_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n")
    (file,) = find_files([str(path)])
    path.write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"changed while it was read .* Start again\."):
        file.check_unchanged()
    (file,) = find_files([str(path)])
    file.check_unchanged()


# Tokenizer and template


def test_a_tokenizer_that_cannot_be_read_is_written_by_transformers(job: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "chat" / "tokenizer"
    known = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    advice = "or write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    with pytest.raises(ValueError) as error:
        open_tokenizer(folder)
    assert advice in str(error.value)
    known.save_pretrained(folder)
    assert open_tokenizer(folder).end == known.eos_token_id
    path = folder / "tokenizer_config.json"
    other = {**json.loads(path.read_text()), "added_tokens_decoder": {"7": {"content": "<other>"}}}
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError) as error:
        open_tokenizer(folder)
    assert "Write both anew with transformers" in str(error.value)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    open_tokenizer(folder)


def test_a_folder_without_one_template_trains_with_a_file(job: list[str], tmp_path: Path) -> None:
    folder, mine = tmp_path / "chat" / "tokenizer", tmp_path / "mine.jinja"
    (folder / "chat_template.jinja").rename(mine)
    refused("Set [chat] template to the path of a Jinja file.", *job, folder=tmp_path)
    path = folder / "tokenizer_config.json"
    named = [{"name": "rag", "template": TEMPLATE}, {"name": "tools", "template": TEMPLATE}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    advice = "Write the one you want into a file and set [chat] template to its path."
    refused(advice, *job, folder=tmp_path)
    goes_on(tmp_path / "run", *job, f"--chat.template={mine}")


def test_a_template_that_drops_a_call_is_replaced_by_one_that_writes_it(job: list[str], tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    record = {"messages": [{"role": "user", "content": "a cat"}, call]}
    folder, mine = tmp_path / "chat" / "tokenizer", tmp_path / "mine.jinja"
    with pytest.raises(ValueError, match=r"its tool call look .* is not in what the template writes for it"):
        ChatTokenizer(folder).encode(record)
    written = "{% for c in message.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    mine.write_text(TEMPLATE.replace("<eos>", written + "<eos>"))
    (example,) = ChatTokenizer(folder, template=mine).encode(record)
    assert example.trained.any()


# Settings


def test_a_split_that_leaves_nothing_is_made_larger(job: list[str], tmp_path: Path) -> None:
    tiny, other = "--chat.validation_split=1e-9", "--chat.validation_split=0.3"
    refused("leaves none for validation. Give another fraction, or a validation file.", *job, tiny, folder=tmp_path)
    goes_on(tmp_path / "run", *job, *VALIDATES, other)


def test_validation_takes_one_source(job: list[str], tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text(json.dumps({"messages": conversation(random.Random(1))}) + "\n")
    chat, split = [*VALIDATES, "--validation.dataset=chat"], "--chat.validation_split=0.3"
    own = [f"--validation.dataset_path={path}", "--validation.seq_len=128"]
    refused("set validation.dataset_path, or chat.validation_split.", *job, *chat, folder=tmp_path)
    both = "chat.validation_split and validation.dataset_path are both set. Leave one of them out."
    refused(both, *job, *chat, *own, split, folder=tmp_path)
    goes_on(tmp_path / "first", *job, *chat, *own)
    goes_on(tmp_path / "second", *job, *chat, split)


def test_chat_data_shows_a_job_whose_dataset_is_chat(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.toml"
    config.write_text('[job]\ncustom_config_module = "lora_converter.titan"\n[training]\ndataset = "c4"\n')
    tokens = [option for option in job if option.startswith(("--training.dataset_path", "--model", "--chat"))]
    command = ["chat-data", str(config), "--model.flavor=debugmodel", f"--job.dump_folder={tmp_path}", *tokens]
    assert main(command) == 1
    assert """training.dataset = 'c4': set it to "chat".""" in capsys.readouterr().err
    assert main([*command, "--training.dataset=chat"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Chat: 40 conversations") and "<eos>»" in shown


def test_a_config_without_a_chat_section_gets_one(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning, whose TOML file names no module."""
    (tmp_path / "my_config.py").write_text(
        "from dataclasses import dataclass\nfrom lora_converter.titan import JobConfig as Parent\n"
        "@dataclass\nclass JobConfig(Parent):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = [option for option in job if not option.startswith("--chat.")]
    with pytest.raises(ValueError) as error:
        build(tmp_path / "run", *options, config=BASE_CONFIG)
    assert "derive your job.custom_config_module from lora_converter.titan.JobConfig, or name" in str(error.value)
    assert "name lora_converter.titan there." in str(error.value)
    runs: list[Run] = [
        train(tmp_path / name, *options, f"--job.custom_config_module={name}", config=BASE_CONFIG)
        for name in ("lora_converter.titan", "my_config")
    ]
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 3
    del sys.modules["my_config"]


@pytest.mark.parametrize("degree", [1, 2])
def test_a_document_mask_is_made_where_torchtitan_can_or_left_out(degree: int, job: list[str], tmp_path: Path) -> None:
    """Context parallelism itself is run by tests/distributed/chat_layouts.py, with both."""
    parallel = f"--parallelism.context_parallel_degree={degree}"
    config = parse(tmp_path, *job, parallel, "--training.seq_len=320")
    with pytest.raises(ValueError) as error:
        flex_arguments(SimpleNamespace(), config)
    assert "llama3 has no FlexAttention in torchtitan 0.2.2" in str(error.value)
    assert 'Set chat.packing = "none" for one conversation per row.' in str(error.value)
    if degree == 1:
        goes_on(tmp_path / "run", *job, "--chat.packing=none")
        return
    arguments = llama3_args["tiny"]
    with pytest.raises(ValueError) as error:
        flex_arguments(arguments, config)
    assert "takes a multiple of 256. Set one, or chat.packing" in str(error.value)
    assert flex_arguments(arguments, parse(tmp_path, *job, parallel, "--training.seq_len=512")).attn_type == "flex"
    config.model.name = "qwen3"
    with pytest.raises(ValueError, match="has no FlexAttention for qwen3 under context parallelism"):
        flex_arguments(arguments, config)


# Resuming


def test_a_run_goes_on_with_its_own_rows_or_starts_anew_from_its_adapters(job: list[str], tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", *job)
    run = tmp_path / "run"
    train(run, *job, EVERY_STEP, "--training.steps=2", "--lr_scheduler.total_steps=3")
    longer = [*job, EVERY_STEP]
    other = "--chat.train_on=last"
    with pytest.raises(ValueError) as error:
        goes_on(run, *longer, other)
    assert (
        "was trained on other rows. What differs: the tokenizer, chat.template, template_args, date or train_on "
        "(digest " in str(error.value)
    )
    assert "or start a run of its own from the checkpoint's weights." in str(error.value)
    new = goes_on(tmp_path / "new", *job, other, f"--lora.initial_adapter_path={step(run, 2)}")
    assert len(new.losses) == 3
    assert "Restore these to go on" in str(error.value)
    assert goes_on(run, *longer).losses == expected.losses[2:]
