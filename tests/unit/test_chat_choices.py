"""Which turns are trained, and how: settings, marks in the record, completions, and what the fingerprint covers."""

import datetime
import json
from pathlib import Path

import pytest
from chat_tokenizers import (
    ANSWER,
    CHATML,
    MISTRAL,
    OTHER,
    SECOND,
    TAGGED,
    TWO_TURNS,
    USER,
    a_folder,
    a_tokenizer,
    chat,
    text,
    trained,
)
from tokenizers import Tokenizer, pre_tokenizers

from lora_converter.chat.formats import BadRecord
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.settings import ChatConfig
from lora_converter.chat.turns import Unmaskable


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_train_on_chooses_turns_and_the_record_takes_some_out(tmp_path: Path, template: str) -> None:
    turn, third = {**ANSWER, "train": False}, {"role": "assistant", "content": "12 miles"}
    record = {"messages": [USER, OTHER, SECOND, turn, SECOND, third, USER]}
    for train_on, expected in {
        "assistant": [["it ran<|im_end|>", "12 miles<|im_end|>"]],
        "last": [["12 miles<|im_end|>"]],
        "each": [["it ran<|im_end|>"], ["12 miles<|im_end|>"]],
    }.items():
        examples = chat(tmp_path, template, train_on=train_on).encode(record)
        assert [trained(tmp_path, example) for example in examples] == expected
        assert all(text(tmp_path, e.ids).endswith("12 miles<|im_end|>\n") for e in examples[1:])
    [example] = chat(tmp_path, template, train_on="all").encode({"messages": [USER, OTHER]})
    assert example.trained.all()
    [example] = chat(tmp_path, template, train_on="all").encode(record)
    assert text(tmp_path, example.ids[~example.trained]) == "on a mat<|im_end|>"
    with pytest.raises(BadRecord, match=r"no token would be trained"):
        chat(tmp_path, template, train_on="last").encode({"messages": record["messages"][:4]})
    with pytest.raises(ValueError, match=r"chat\.train_on = 'every': must be one of assistant, last, each, all\."):
        chat(tmp_path, template, train_on="every")


def test_settings_that_are_none_are_refused_with_those_that_are() -> None:
    for name, value, allowed in [
        ("train_on", "every", "must be one of assistant, last, each, all."),
        ("packing", "", "must be one of documents, none."),
        ("too_long", None, "must be one of drop, error, truncate."),
        ("epochs", -1, "must be at least 0."),
        ("validation_split", 1, "must be at least 0 and below 1."),
        ("template_args", "x", "must be a table."),
    ]:
        with pytest.raises(ValueError) as error:
            ChatConfig(**{name: value})
        assert str(error.value) == f"chat.{name} = {value!r}: {allowed}"


def test_generation_blocks_that_cannot_be_told_apart_by_turn_are_refused(tmp_path: Path) -> None:
    moves = "{{ 'x' * messages | length }}" + TAGGED
    assert trained(tmp_path, chat(tmp_path, moves).encode(TWO_TURNS)[0]) == ["on a mat<|im_end|>", "it ran<|im_end|>"]
    record = {"messages": [USER, {**ANSWER, "train": False}, SECOND, OTHER]}
    with pytest.raises(Unmaskable, match=r"message 3: the template writes other {% generation %} blocks"):
        chat(tmp_path, moves).encode(record)


def test_a_first_token_that_holds_the_prompts_end_is_refused_and_one_turn_per_example_splits_it(tmp_path: Path) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "\n\non a mat"}]}
    with pytest.raises(Unmaskable, match=r"message 1: the first token of the answer .*train_on = \"each\" works"):
        chat(tmp_path).encode(record)
    [example] = chat(tmp_path, train_on="each").encode(record)
    prompt = a_tokenizer(CHATML).apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt and not example.trained[: len(prompt)].any()
    assert trained(tmp_path, example) == ["\n\non a mat<|im_end|>"]


def test_a_tokenizer_that_begins_every_text_with_a_space_is_not_split(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(a_folder(tmp_path, CHATML) / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    record = {"messages": [USER, {"role": "assistant", "content": "\n\non a mat"}]}
    with pytest.raises(Unmaskable, match=r"first token of the answer .*Set \[chat\] template"):
        ChatTokenizer(tmp_path, train_on="each").encode(record)


@pytest.mark.parametrize("prompt", ["", "the cat", "the cat sat\n"])
def test_a_completion_is_tokenized_as_by_transformers_and_its_end_is_trained_once(tmp_path: Path, prompt: str) -> None:
    a_folder(tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = ChatTokenizer(tmp_path)
    for completion in (" on a mat", " on a mat</s>", " naïve 🙂"):
        [example] = tokenizer.encode({"prompt": prompt, "completion": completion})
        whole = prompt + completion.removesuffix("</s>") + "</s>"
        assert example.ids.tolist() == a_tokenizer("")(whole)["input_ids"]
        assert trained(tmp_path, example) == [completion.removesuffix("</s>") + "</s>"]
    with pytest.raises(ValueError, match=r"has no chat template: .*Set \[chat\] template") as error:
        tokenizer.encode(TWO_TURNS)
    assert not isinstance(error.value, BadRecord)


def test_a_completion_without_an_end_token_is_refused(tmp_path: Path) -> None:
    a_folder(tmp_path, CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    with pytest.raises(BadRecord, match=r"a completion ends with the eos_token, and tokenizer_config.json names none"):
        ChatTokenizer(tmp_path).encode({"prompt": "a", "completion": "b"})


def test_lists_of_messages_as_prompt_and_completion_train_what_follows_the_generation_prompt(tmp_path: Path) -> None:
    messages = TWO_TURNS["messages"]
    [example] = chat(tmp_path).encode({"prompt": messages[:3], "completion": messages[3:]})
    prompt = a_tokenizer(CHATML).apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert example.ids[: len(prompt)].tolist() == prompt and example.trained.argmax() == len(prompt)
    assert trained(tmp_path, example) == ["it ran<|im_end|>"]


def test_a_token_outside_the_models_vocabulary_and_half_a_letter_are_refused(tmp_path: Path) -> None:
    size = int(chat(tmp_path).encode(TWO_TURNS)[0].ids.max()) + 1
    assert chat(tmp_path, vocab_size=size).encode(TWO_TURNS)
    with pytest.raises(
        BadRecord, match=rf"token {size - 1} \('<\|im_start\|>'\) is outside the model's vocabulary of {size - 1}"
    ):
        chat(tmp_path, vocab_size=size - 1).encode(TWO_TURNS)
    with pytest.raises(BadRecord, match=r"the text cannot be tokenized"):
        chat(tmp_path).encode({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]})


def test_the_fingerprint_changes_with_what_changes_the_result_and_with_nothing_else(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y') }}" + CHATML
    day = datetime.date(2020, 1, 1)
    first = chat(tmp_path / "a").fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    assert chat(tmp_path / "b").fingerprint() == first
    assert chat(tmp_path / "b", date=day, vocab_size=10**6).fingerprint() == first
    assert ChatTokenizer(a_folder(tmp_path / "c", CHATML, pad_token="</s>")).fingerprint() == first
    others = [
        chat(tmp_path / "d", CHATML + "<|im_end|>").fingerprint(),
        chat(tmp_path / "d", dated).fingerprint(),
        chat(tmp_path / "d", dated, date=day).fingerprint(),
        chat(tmp_path / "d", CHATML + "{{ x }}").fingerprint(),
        chat(tmp_path / "d", CHATML + "{{ x }}", template_args={"x": ""}).fingerprint(),
        chat(tmp_path / "d", train_on="each").fingerprint(),
        chat(tmp_path / "d", vocab_size=10).fingerprint(),
        ChatTokenizer(a_folder(tmp_path / "d", CHATML, eos_token="<|im_end|>")).fingerprint(),
        ChatTokenizer(a_folder(tmp_path / "d", MISTRAL), template=tmp_path / "a" / "chat_template.jinja").fingerprint(),
    ]
    assert len({first, *others}) == len(others) + 1


def test_the_day_is_one_of_the_calendar_and_in_quotes() -> None:
    assert ChatConfig(date="2024-02-29").date == "2024-02-29"
    for wrong in ("2025-02-29", "20250101", "2025-1-1", "today", "", datetime.date(2025, 1, 1)):
        with pytest.raises(ValueError) as error:
            ChatConfig(date=wrong)  # type: ignore[arg-type]
        assert str(error.value) == f'chat.date = {wrong!r}: must be a day in quotes, as "2025-01-01".'
