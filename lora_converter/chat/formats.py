"""Records of a data set as conversations: what the model reads, and which turns it may be trained on.

| keys | known as | trained |
|---|---|---|
| `messages`: `role`, `content` (`tool_calls`, `reasoning_content`, ...) | OpenAI, transformers, TRL | assistant turns |
| `conversations`: `from`, `value` | ShareGPT | assistant turns |
| `instruction`, `input`, `output` | Alpaca | the output |
| `prompt`, `completion`: lists of messages | TRL | assistant turns of the completion |
| `prompt`, `completion`: texts | TRL | the completion, without a chat template |

The first line of the table whose keys a record has counts; other keys are ignored. `tools` may stand beside messages,
as a list or as the JSON text of one; `system` beside `conversations` and `instruction`. An assistant message with
`"train": false` or `"weight": 0` is read and not trained.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which messages carry what the model thought before it answered. Templates read one of the former two."""

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}

Message = dict[str, Any]


class BadRecord(ValueError):
    """A record that cannot be trained on, and why."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that Hugging Face's chat templates expect.

    Attributes:
        messages: `role`, `content` as text, and the record's other keys. The arguments of tool calls are objects.
        tools: Schemas of the functions that may be called; None if the record names none.
        trained: For each message, whether it is an assistant turn that may be trained.
    """

    messages: list[Message]
    tools: list[Any] | None
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on. No chat template is applied."""

    prompt: str
    completion: str


def example_of(record: Mapping[str, Any]) -> Conversation | Completion:
    """What a record teaches; see the module's table for the formats.

    Args:
        record: Without nulls, as `reading.py` has it.

    Raises:
        BadRecord: It has none of the formats, or something in it has another type than its format says.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"the record is {_kind(record)}, not an object")
    if "messages" in record:
        return _conversation(_messages(record["messages"], "messages"), record)
    if "conversations" in record:
        return _conversation(_system(record) + _messages(record["conversations"], "conversations"), record)
    if {"prompt", "completion"} <= record.keys():
        return _prompt_and_completion(record)
    if {"instruction", "output"} <= record.keys():
        return _alpaca(record)
    raise BadRecord(
        f"keys {sorted(map(str, record))} are none of the formats: messages; conversations; prompt and completion; "
        "instruction, input and output"
    )


def _conversation(messages: list[Message], fields: Mapping[str, Any], first_trained: int = 0) -> Conversation:
    if not messages:
        raise BadRecord("no messages")
    read = [_message(message, f"message {index}") for index, message in enumerate(messages)]
    trained = tuple(
        index >= first_trained and clean["role"] == "assistant" and _trains(message, f"message {index}")
        for index, (clean, message) in enumerate(zip(read, messages, strict=True))
    )
    if not any(message["role"] == "assistant" for message in read[first_trained:]):
        raise BadRecord("no assistant turn")
    return Conversation(read, _tools(fields.get("tools")), trained)


def _prompt_and_completion(fields: Mapping[str, Any]) -> Conversation | Completion:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRecord(
            f"prompt is {_kind(prompt)} and completion is {_kind(completion)}; both are texts, or lists of messages"
        )
    prompt, completion = _messages(prompt, "prompt"), _messages(completion, "completion")
    return _conversation(prompt + completion, fields, first_trained=len(prompt))


def _alpaca(fields: Mapping[str, Any]) -> Conversation:
    for key in ("instruction", "input", "output"):
        if not isinstance(fields.get(key, ""), str):
            raise BadRecord(f"{key} is {_kind(fields[key])}, not text")
    if fields.get("history"):
        raise BadRecord("history is not read. Write earlier turns as messages")
    question = "\n\n".join(part for part in (fields["instruction"], fields.get("input")) if part)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    return _conversation(_system(fields) + turns, {})


def _system(fields: Mapping[str, Any]) -> list[Message]:
    """The system message that stands beside the turns, if any."""
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _messages(value: Any, key: str) -> list[Message]:
    """A list of objects, from a list or from what numpy and Arrow have for one."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise BadRecord(f"{key} is {_kind(value)}, not a list of messages")
    messages = list(value)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRecord(f"{key}: message {index} is {_kind(message)}, not an object")
    return messages


def _message(message: Mapping[str, Any], where: str) -> Message:
    """A message as templates expect it: a known role, content as text, calls with objects."""
    role = _role(message, where)
    content = _text_of(message, f"{where} ({role})")
    clean = {key: value for key, value in message.items() if key not in _OURS}
    if calls := clean.pop("tool_calls", None):
        clean["tool_calls"] = [_call(call, f"{where} ({role})") for call in _listed(calls, f"{where}: tool_calls")]
    if reasoning := next((clean[key] for key in REASONING if isinstance(clean.get(key), str)), None):
        clean = {**dict.fromkeys(("reasoning_content", "thinking"), reasoning), **clean}
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f"{where} ({role}): content is {_kind(content)}, not text")
    return {"role": role, "content": content, **clean}


_OURS = {"role", "from", "content", "value", "train", "weight"}
"""Keys of a message that are read here; the template gets the others as they are."""


def _role(message: Mapping[str, Any], where: str) -> str:
    given, known = message.get("role"), {role: role for role in ROLES}
    if given is None and message.get("from") is not None:
        given, known = message["from"], _SHAREGPT_ROLES
    if given is None:
        raise BadRecord(f"{where}: no role. A message has role and content, or from and value")
    if not isinstance(given, str) or given not in known:
        raise BadRecord(f"{where}: unknown role {given!r}; the roles are {', '.join(known)}")
    return known[given]


def _text_of(message: Mapping[str, Any], where: str) -> Any:
    """The content: text parts are joined; what is neither text nor text parts is returned as it is."""
    content = message.get("content" if message.get("role") is not None else "value")
    if isinstance(content, str | Mapping) or not isinstance(content, Iterable):
        return content
    parts = list(content)
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"a part of type {part.get('type')!r}" if isinstance(part, Mapping) else _kind(part)
            raise BadRecord(f'{where}: content has {kind}; only parts {{"type": "text", "text": ...}} are read')
    return "".join(part["text"] for part in parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as `{"type": "function", "function": {"name", "arguments"}}`, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecord(f'{where}: a tool call is {{"function": {{"name": ..., "arguments": ...}}}}, not {call!r:.80}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {function['name']}")
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"{where}: the arguments of {function['name']} are {_kind(arguments)}, not an object")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    read = _listed(tools, "tools") if tools is not None else None
    if read and not all(isinstance(tool, dict) for tool in read):
        raise BadRecord("tools holds something else than objects. Each is the JSON schema of a function")
    return read or None


def _listed(value: Any, where: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise BadRecord(f"{where} is {_kind(value)}, not a list")
    return list(value)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRecord(f"{where}: {text!r:.80} is no JSON ({error})") from error


def _trains(message: Mapping[str, Any], where: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train not in (None, True, False):
        raise BadRecord(f"{where}: train is {train!r}; it is true or false")
    if weight not in (None, 0, 1):
        raise BadRecord(f"{where}: weight is {weight!r}; it is 0 (not trained) or 1")
    return train in (None, True) and weight != 0


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    kinds = ((str, "text"), ((int, float), "a number"), (Mapping, "an object"), (Iterable, "a list"))
    return next((name for types, name in kinds if isinstance(value, types)), type(value).__name__)
