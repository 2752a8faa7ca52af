"""Records of the usual formats become conversations; what is none of them is refused with the place and the reason."""

import json
from typing import Any

import numpy as np
import pytest

from lora_converter.chat.formats import BadRecord, Completion, Conversation, example_of

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def conversation_of(record: dict[str, Any]) -> Conversation:
    example = example_of(record)
    assert isinstance(example, Conversation)
    return example


FORMATS = {
    "messages": {"messages": [HI, HELLO]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "roles under conversations": {"conversations": [HI, HELLO]},
    "instruction": {"instruction": "Hi", "output": "Hello"},
    "prompt and completion": {"prompt": [HI], "completion": [HELLO]},
    "more columns": {"messages": [HI, HELLO], "prompt": "Hi", "prompt_id": "7", "source": "web", "text": "Hi Hello"},
    "numpy": {"messages": np.array([HI, HELLO], dtype=object)},
}


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS)
def test_each_format_gives_the_same_conversation(record: dict[str, Any]) -> None:
    assert conversation_of(record) == Conversation([HI, HELLO], None, (False, True))


def test_alpacas_input_follows_its_instruction_and_an_empty_one_is_none() -> None:
    messages = conversation_of({"instruction": "Add", "input": "1 2", "output": "3"}).messages
    assert [message["content"] for message in messages] == ["Add\n\n1 2", "3"]
    assert conversation_of({"instruction": "Hi", "input": "", "output": "Hello"}).messages == [HI, HELLO]


@pytest.mark.parametrize("name", ["conversations", "instruction"])
def test_a_system_text_beside_the_turns_comes_first(name: str) -> None:
    messages = conversation_of({**FORMATS[name], "system": "Be kind"}).messages
    assert messages == [{"role": "system", "content": "Be kind"}, HI, HELLO]
    assert conversation_of({**FORMATS[name], "system": ""}).messages == [HI, HELLO]


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("system", "system"), ("observation", "tool")],
)
def test_sharegpt_roles_are_read(name: str, role: str) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": name, "value": "x"}, {"from": "gpt", "value": "Hello"}]
    assert conversation_of({"conversations": turns}).messages[1] == {"role": role, "content": "x"}


def test_texts_are_a_completion_and_lists_train_the_completions_turns_alone() -> None:
    assert example_of({"prompt": "1+1=", "completion": "2"}) == Completion("1+1=", "2")
    record = {"prompt": [HI, HELLO, HI], "completion": [HELLO, HI, HELLO]}
    assert conversation_of(record).trained == (False, False, False, True, False, True)


def test_train_false_and_weight_0_take_a_turn_out() -> None:
    marks: list[dict[str, Any]] = [{}, {"train": False}, {"train": True}, {"weight": 0}, {"weight": 1}, {"weight": 0.0}]
    record = {"messages": [HI, *({**HELLO, **mark} for mark in marks)]}
    assert conversation_of(record).trained == (False, True, False, True, False, True, False)
    assert conversation_of(record).messages == [HI] + [HELLO] * 6


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert conversation_of({"messages": [HI, {"role": "assistant", "content": parts}]}).messages == [HI, HELLO]


def test_arguments_as_json_text_are_the_same_call_and_keep_their_nulls() -> None:
    for written in (CALL["function"], {"name": "add", "arguments": '{"a": 1}'}):
        for call in ({"type": "function", "function": written}, written):
            messages = conversation_of({"messages": [HI, {"role": "assistant", "tool_calls": [call]}]}).messages
            assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    call = {"name": "add", "arguments": '{"a": null}'}
    messages = conversation_of({"messages": [HI, {"role": "assistant", "tool_calls": [call]}]}).messages
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_tools_may_be_json_text_and_an_empty_list_is_none() -> None:
    tools = [{"name": "add", "parameters": {"default": None}}]
    assert conversation_of({"messages": [HI, HELLO], "tools": json.dumps(tools)}).tools == tools
    for empty in ([], "", "[]"):
        assert conversation_of({"messages": [HI, HELLO], "tools": empty}).tools is None


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_stands_under_the_names_that_templates_read(key: str) -> None:
    message = conversation_of({"messages": [HI, {**HELLO, key: "because"}]}).messages[1]
    assert message["reasoning_content"] == message["thinking"] == "because"


BAD = [
    (
        {"a": 1, "b": 2},
        r"keys \['a', 'b'\] are none of the formats: messages; conversations; prompt and completion; inst",
    ),
    ([], r"the record is a list, not an object"),
    ({"messages": []}, r"no messages"),
    ({"messages": "Hi"}, r"messages is text, not a list of messages"),
    ({"messages": ["Hi"]}, r"messages: message 0 is text, not an object"),
    ({"messages": [{"role": "user", "content": None}, HELLO]}, r"message 0 \(user\): content is null, not text"),
    ({"messages": [{"role": "user", "content": 5}, HELLO]}, r"message 0 \(user\): content is a number, not text"),
    ({"messages": [HI, {"role": "assistant"}]}, r"message 1 \(assistant\): content is null, not text"),
    (
        {"messages": [HI, HELLO, {"role": "boss", "content": "x"}]},
        r"message 2: unknown role 'boss'; the roles are system, ",
    ),
    ({"messages": [{"role": "gpt", "content": "x"}]}, r"unknown role 'gpt'"),
    (
        {"conversations": [{"from": "alien", "value": "x"}]},
        r"message 0: unknown role 'alien'; the roles are .*human.*gpt",
    ),
    ({"messages": [{"content": "x"}]}, r"message 0: no role. A message has role and content, or from and value"),
    ({"messages": [HI]}, r"no assistant turn"),
    ({"prompt": [HI, HELLO], "completion": [HI]}, r"no assistant turn"),
    ({"prompt": "Hi", "completion": [HELLO]}, r"prompt is text and completion is a list; both are texts, or lists"),
    ({"prompt": 1, "completion": 2}, r"prompt is a number, not a list of messages"),
    ({"instruction": "x", "output": 3}, r"output is a number, not text"),
    (
        {"instruction": "x", "output": "y", "history": [["a", "b"]]},
        r"history is not read. Write earlier turns as messages",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, HELLO]},
        r"message 0 \(user\): content has a part of type 'image'; only parts",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}, HELLO]}, r"message 0 \(user\): content has text; only parts"),
    ({"messages": [HI, {**HELLO, "train": "no"}]}, r"message 1: train is 'no'; it is true or false"),
    ({"messages": [HI, {**HELLO, "weight": 0.5}]}, r"message 1: weight is 0.5; it is 0 \(not trained\) or 1"),
    ({"messages": [HI, {**HELLO, "tool_calls": ["add"]}]}, r"message 1 \(assistant\): a tool call is .* not 'add'"),
    ({"messages": [HI, {**HELLO, "tool_calls": "add"}]}, r"message 1: tool_calls is text, not a list"),
    (
        {"messages": [HI, {**HELLO, "tool_calls": [{"name": "add", "arguments": "{"}]}]},
        r"message 1 \(assistant\): the arguments of add: '\{' is no JSON",
    ),
    (
        {"messages": [HI, {**HELLO, "tool_calls": [{"name": "add", "arguments": "[1]"}]}]},
        r"the arguments of add are a list, not an object",
    ),
    ({"messages": [HI, HELLO], "tools": {"name": "add"}}, r"tools is an object, not a list"),
    ({"messages": [HI, HELLO], "tools": "{"}, r"tools: '\{' is no JSON"),
    ({"messages": [HI, HELLO], "tools": ["add"]}, r"tools holds something else than objects"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_record_is_refused_with_its_place_and_reason(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        example_of(record)
