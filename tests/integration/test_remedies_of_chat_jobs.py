"""What the messages of chat jobs say to do is done, and the job is built or trains. One rank."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_job import chat_options
from harness import build, finish, parse, train
from safetensors.torch import load_file, save_file
from torchtitan.protocols import train_spec

from lora_converter.chat.crew import Crew
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.cli import main
from lora_converter.titan.chat import ChatJob
from lora_converter.titan.checks import check_settings

pytestmark = pytest.mark.slow

NO_BASE = "--checkpoint.initial_load_path="


def job(folder: Path, chat: Path, *options: str, without: str = "") -> ChatJob:
    """What the trainer makes of these options before it builds the model."""
    config = parse(folder, NO_BASE, *chat_options(chat), *options)
    if without:
        delattr(config, without)
    spec = train_spec.get_train_spec(config.model.name)
    made = ChatJob(config, spec, Crew())
    made.change(spec, validates=config.validation.enable and config.validation.dataset == "chat")
    return made


def own_validation(chat: Path) -> list[str]:
    path = f"--validation.dataset_path={chat}/train.jsonl"
    return ["--validation.enable", "--validation.dataset=chat", "--validation.seq_len=256", path]


SPLIT = "--chat.validation_split=0.1"
QWEN3 = ("--model.name=qwen3", "--model.flavor=debugmodel")
CP2 = "--parallelism.context_parallel_degree=2"


@pytest.mark.parametrize(
    ("wrong", "told", "right"),
    [
        (["--training.dataset_path="], "set training.dataset_path to files of conversations", []),
        ([SPLIT, "own"], "are both set. Leave one of them out", ["own"]),
        ([SPLIT, "own"], "are both set. Leave one of them out", [SPLIT]),
        (["none"], "set validation.dataset_path, or chat.validation_split", ["own"]),
        (["none"], "set validation.dataset_path, or chat.validation_split", ["none", SPLIT]),
        ([*QWEN3, CP2], 'Set chat.packing = "none" for one conversation per row', [*QWEN3, CP2, "--chat.packing=none"]),
        ([CP2, "--training.seq_len=384"], "takes a multiple of 256. Set one", [CP2, "--training.seq_len=512"]),
        (["--chat.validation_split=0.00001"], "Give another fraction", [SPLIT]),
    ],
)
def test_a_job_is_built_once_it_is_set_as_its_message_says(
    wrong: list[str], told: str, right: list[str], chat: Path, tmp_path: Path
) -> None:
    named = {"own": own_validation(chat), "none": own_validation(chat)[:2]}

    def expanded(options: list[str]) -> list[str]:
        return [option for name in options for option in named.get(name, [name])]

    with pytest.raises(ValueError, match=re.escape(told)):
        job(tmp_path, chat, *expanded(wrong))
    assert job(tmp_path, chat, *expanded(right)).data.rows.per_epoch > 1


def test_a_config_module_of_the_users_own_gets_the_section_by_deriving(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        job(tmp_path, chat, without="chat")
    assert "derive your job.custom_config_module from lora_converter.titan.JobConfig" in str(error.value)
    assert "or name lora_converter.titan there" in str(error.value)
    (tmp_path / "my_config.py").write_text(
        "from dataclasses import dataclass\nfrom lora_converter.titan import JobConfig as Ours\n\n\n"
        "@dataclass\nclass JobConfig(Ours):\n    pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert job(tmp_path, chat, "--job.custom_config_module=my_config").data.rows.per_epoch > 1


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallelism.pipeline_parallel_degree=2"],
        ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
    ],
    ids=["PP", "DDP"],
)
def test_phase_1_on_conversations_takes_another_layout_or_text(layout: list[str], chat: Path, tmp_path: Path) -> None:
    job = ["--lora.full_phase.steps=2", NO_BASE, *chat_options(chat)]
    told = r"clips other gradients there than on one rank.*Set another layout, or lora\.full_phase\.dataset to text"
    with pytest.raises(ValueError, match=told):
        check_settings(parse(tmp_path, *job, *layout))
    check_settings(parse(tmp_path, *job))
    check_settings(parse(tmp_path, *job, *layout, "--lora.full_phase.dataset=c4_test"))


def test_the_command_takes_a_job_whose_dataset_is_chat(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text('[job]\ncustom_config_module = "lora_converter.titan"\n[model]\nflavor = "debugmodel"\n')
    options = [option for option in chat_options(chat) if option != "--training.dataset=chat"]
    assert main(["chat-data", f"{toml}", *options]) == 1
    assert 'set it to "chat"' in capsys.readouterr().err
    assert main(["chat-data", f"{toml}", *options, "--training.dataset=chat"]) == 0


def test_other_rows_train_in_a_run_of_its_own_that_starts_from_the_adapters(
    chat: Path, dcp_base: Path, tmp_path: Path
) -> None:
    options = [f"--checkpoint.initial_load_path={dcp_base}", *chat_options(chat), "--training.steps=2"]
    train(tmp_path / "first", *options, "--checkpoint.no-last_save_model_only")
    run: Any = build(tmp_path / "first", *options, "--training.steps=3", "--chat.packing=none")
    with pytest.raises(ValueError, match="start a run of its own from the checkpoint's weights"):
        run.trainer.checkpointer.load()
    run.trainer.close()
    start = f"--lora.initial_adapter_path={tmp_path}/first/checkpoint/step-2"
    second = build(tmp_path / "second", *options, "--chat.packing=none", start)
    finish(second)
    assert len(second.losses) == 2


def test_bad_records_are_removed_and_files_of_another_kind_replaced(chat: Path, tmp_path: Path) -> None:
    good = (chat / "train.jsonl").read_text()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": null}]}\n' + good)
    with pytest.raises(ValueError, match=r"1 of 121 records cannot be used: bad\.jsonl:1: .*Correct or remove them"):
        job(tmp_path, chat, f"--training.dataset_path={bad}")
    bad.write_text(good)
    assert job(tmp_path, chat, f"--training.dataset_path={bad}").data.rows.dataset.counts.conversations == 120
    text = tmp_path / "train.txt"
    text.write_text(good)
    with pytest.raises(ValueError, match=r"is of another kind\. Give \.jsonl, \.json"):
        job(tmp_path, chat, f"--training.dataset_path={text}")
    text.rename(tmp_path / "train.jsonl")
    assert job(tmp_path, chat, f"--training.dataset_path={tmp_path}/train.jsonl").data.rows.per_epoch > 1


def test_a_file_that_changed_while_it_was_read_is_read_again(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growing.jsonl"
    path.write_text((chat / "train.jsonl").read_text())
    encode = ChatTokenizer.encode

    def encode_and_grow(self: ChatTokenizer, record: Any) -> Any:
        with path.open("a") as file:
            file.write((chat / "train.jsonl").read_text().splitlines(keepends=True)[0])
        return encode(self, record)

    options = (f"--training.dataset_path={path}", f"--chat.cache_path={tmp_path}/cache")
    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, "encode", encode_and_grow)
        with pytest.raises(ValueError, match=r"changed while it was read .*Start again"):
            job(tmp_path, chat, *options)
    lines = len(path.read_text().splitlines())
    assert job(tmp_path, chat, *options).data.rows.dataset.counts.conversations == lines > 120


def test_an_instruct_model_knows_the_token_that_ends_a_turn(
    chat: Path, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base has a row of zeros there, and the instruct model has not."""
    base = shutil.copytree(hf_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    added = json.loads((chat / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    weights["lm_head.weight"][[token["id"] for token in added if token["content"] == "<eos>"]] = 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for path, warned in ((base, True), (hf_base, False)):
        caplog.clear()
        options = [f"--checkpoint.initial_load_path={path}", "--checkpoint.initial_load_in_hf", *chat_options(chat)]
        run = build(tmp_path / f"run-{warned}", *options)
        run.trainer.checkpointer.load()
        run.trainer.close()
        assert ("the base's output has untrained rows for '<eos>'" in caplog.text) is warned
        assert ("Use an instruct model" in caplog.text) is warned
