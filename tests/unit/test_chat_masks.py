"""What is trained, and what is refused. Each report that users of other trainers have filed stands here by its name."""

import logging
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import (
    ANSWER,
    CHATML,
    FORGETS,
    MISTRAL,
    OTHER,
    PLAIN,
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
from chat_words import built, write_lines
from tokenizers import Tokenizer, processors

from lora_converter.chat.formats import BadRecord
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.turns import Unmaskable


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_end_of_turn_cut_by_the_mask_it_is_trained_and_the_line_end_behind_it_is_not(
    tmp_path: Path, template: str
) -> None:
    [example] = chat(tmp_path, template).encode(TWO_TURNS)
    assert trained(tmp_path, example) == ["on a mat<|im_end|>", "it ran<|im_end|>"]
    assert text(tmp_path, example.ids) == a_tokenizer(template).apply_chat_template(
        TWO_TURNS["messages"], tokenize=False
    )
    assert example.ids.dtype == "uint32" and example.trained.dtype == "bool"


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_an_empty_answer_trains_its_end_and_one_of_white_space_keeps_it(tmp_path: Path, template: str) -> None:
    for content in ("", "on a mat  \n\n", "a"):
        [example] = chat(tmp_path, template).encode({"messages": [USER, {"role": "assistant", "content": content}]})
        assert trained(tmp_path, example) == [content + "<|im_end|>"]


def test_prompt_not_a_prefix_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    for train_on in ("assistant", "last", "each"):
        with pytest.raises(
            Unmaskable, match=r"message \d: .* generation prompt \('<think>\\n' becomes .*\[chat\] template"
        ):
            chat(tmp_path, template, train_on=train_on).encode(TWO_TURNS)


def test_rewritten_history_is_refused_and_the_setting_that_works_is_named(tmp_path: Path) -> None:
    record = {"messages": [USER, {**ANSWER, "reasoning_content": "because"}, SECOND, OTHER]}
    with pytest.raises(Unmaskable, match=r"message 1: the template rewrites this turn .*train_on = \"each\" works"):
        chat(tmp_path, FORGETS).encode(record)
    first, second = chat(tmp_path, FORGETS, train_on="each").encode(record)
    assert trained(tmp_path, first) == ["<think>because</think>on a mat<|im_end|>"]
    assert trained(tmp_path, second) == ["it ran<|im_end|>"]
    [example] = chat(tmp_path, FORGETS).encode({"messages": record["messages"][:2]})
    assert trained(tmp_path, example) == ["<think>because</think>on a mat<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ({"reasoning_content": "because"}, r"its reasoning_content \('because'\) is not in what the template writes"),
        ({"tool_calls": [{"name": "add", "arguments": {}}]}, r"its tool call add \('add'\) is not in what"),
    ],
)
def test_reasoning_content_lost_is_refused_and_so_are_calls(
    tmp_path: Path, template: str, lost: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unmaskable, match="message 1: " + reason):
        chat(tmp_path, template).encode({"messages": [USER, {**ANSWER, **lost}]})
    only_read = {"messages": [USER, {**ANSWER, **lost, "train": False}, SECOND, OTHER]}
    assert trained(tmp_path, chat(tmp_path, template).encode(only_read)[0]) == ["it ran<|im_end|>"]
    [example] = chat(tmp_path, template, train_on="all").encode(only_read)
    assert text(tmp_path, example.ids[~example.trained]) == "on a mat<|im_end|>"


def test_reasoning_within_the_content_is_not_lost_either(tmp_path: Path) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "<think>because</think>on a mat"}]}
    cuts = TAGGED.replace("{% generation %}{{ m.content }}", "{% generation %}{{ m.content.split('</think>') | last }}")
    with pytest.raises(Unmaskable, match=r"message 1: its reasoning in the content \('because'\)"):
        chat(tmp_path, cuts).encode(record)
    assert trained(tmp_path, chat(tmp_path, TAGGED).encode(record)[0]) == ["<think>because</think>on a mat<|im_end|>"]


def test_tools_that_the_template_does_not_write_are_refused(tmp_path: Path) -> None:
    record = {**TWO_TURNS, "tools": [{"type": "function", "function": {"name": "add"}}]}
    with pytest.raises(Unmaskable, match=r"the tool add is not in what the template writes"):
        chat(tmp_path).encode(record)
    assert chat(tmp_path, "{{ tools | tojson }}" + CHATML).encode(record)


@pytest.mark.parametrize("train_on", ["assistant", "last", "each"])
def test_silent_all_zero_mask_is_refused(tmp_path: Path, train_on: str) -> None:
    out = {"messages": [USER, {**ANSWER, "train": False}, SECOND, {**OTHER, "weight": 0}]}
    with pytest.raises(BadRecord, match=r"no token would be trained: the record takes out"):
        chat(tmp_path, train_on=train_on).encode(out)
    wrong = TAGGED.replace("m.role == 'assistant'", "m.role == 'bot'")
    with pytest.raises(BadRecord, match=r"its content \('on a mat'\) is not in|writes no {% generation %} block"):
        chat(tmp_path, wrong, train_on=train_on).encode(TWO_TURNS)
    with pytest.raises(BadRecord, match=r"no token would be trained|writes no {% generation %} block"):
        chat(tmp_path, wrong, train_on=train_on).encode({"messages": [USER, {**ANSWER, "content": ""}]})


def test_double_bos_there_is_one_and_no_second_end(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, "{{ bos_token }}" + CHATML)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    ends = [("<s>", bos), ("</s>", eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    [example] = ChatTokenizer(folder).encode(TWO_TURNS)
    assert example.ids.tolist().count(bos) == 1 and eos not in example.ids
    [example] = ChatTokenizer(folder).encode({"prompt": "the cat", "completion": " sat"})
    assert text(folder, example.ids) == "<s>the cat sat</s>"


def test_multi_turn_mistral_trains_every_answer_with_its_end(tmp_path: Path) -> None:
    [example] = chat(tmp_path, MISTRAL).encode(TWO_TURNS)
    assert trained(tmp_path, example) == [" on a mat</s>", " it ran</s>"]
    assert (
        text(tmp_path, example.ids) == "<s>[INST] the cat sat [/INST] on a mat</s>[INST] and then? [/INST] it ran</s>"
    )


def test_eos_never_learned_because_it_pads_it_is_trained(tmp_path: Path) -> None:
    a_folder(tmp_path, MISTRAL, pad_token="</s>")
    [example] = ChatTokenizer(tmp_path).encode(TWO_TURNS)
    assert [answer[-4:] for answer in trained(tmp_path, example)] == ["</s>", "</s>"]


def test_eos_never_learned_because_the_template_writes_none_is_refused_or_said(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(Unmaskable, match=r"writes no end of turn behind ' on a mat': the model would never stop"):
        chat(tmp_path, PLAIN).encode(TWO_TURNS)
    tokenizer = chat(tmp_path, TAGGED.replace("{{ m.content }}<|im_end|>{% endg", "{{ m.content }}{% endg"))
    with caplog.at_level(logging.WARNING, "lora_converter"):
        tokenizer.encode(TWO_TURNS)
        tokenizer.encode(TWO_TURNS)
    [message] = caplog.messages
    assert message.endswith("but with 'it ran': the model will not learn to stop there.")


def test_bad_role_without_a_line_number_the_message_has_file_line_and_place(tmp_path: Path) -> None:
    bad = {"messages": [USER, {"role": "boss", "content": "x"}, ANSWER]}
    data = write_lines(tmp_path / "train.jsonl", [TWO_TURNS, TWO_TURNS, bad, TWO_TURNS])
    with pytest.raises(ValueError) as error:
        built(data, tmp_path / "cache", encoder=chat(tmp_path / "tokenizer"))
    assert "records cannot be used: train.jsonl:3: message 1: unknown role 'boss'; the roles are" in str(error.value)
