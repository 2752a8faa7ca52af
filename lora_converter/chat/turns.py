"""Where the assistant's turns stand in a rendered conversation.

Two ways. A template with `{% generation %}` blocks says it itself. For any other, turn i lies between two renderings:

    messages before it, with the generation prompt     <start>user\\nHi<end>\\n<start>assistant\\n
    the messages up to it                              <start>user\\nHi<end>\\n<start>assistant\\nHello<end>\\n
                                                                                              ^^^^^^^^^^

This holds only where the whole conversation begins with both, which is verified for every turn. It does not for
templates that write earlier turns otherwise than the last one, such as those that leave out old reasoning. White space
that the template writes behind the turn's end token is not the model's and does not count.
"""

import re
from collections.abc import Collection
from typing import Any

from lora_converter.chat.formats import REASONING, BadRecord, Conversation, Message
from lora_converter.chat.template import ChatTemplate, Rendered, Span


class Unmaskable(BadRecord):
    """A conversation in which the template does not let us see what the assistant wrote. The template is to blame."""


def tagged_spans(
    template: ChatTemplate, conversation: Conversation, whole: Rendered, turns: Collection[int]
) -> list[Span]:
    """What `{% generation %}` blocks wrote for some of the assistant's turns.

    The blocks of turn i are those that appear after the messages before it are written, and before the next turn.

    Args:
        turns: Indices of messages.

    Raises:
        Unmaskable: The blocks cannot be told apart by turn.
    """
    messages, tools = conversation.messages, conversation.tools
    starts = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    counts = {starts[0]: 0, len(messages): len(whole.spans)}
    for index in starts[1:]:
        if index in turns or starts[starts.index(index) - 1] in turns:
            before = template.render(messages[:index], tools).spans
            if before != whole.spans[: len(before)]:
                raise Unmaskable(
                    f"message {index}: the template writes other {{% generation %}} blocks when this turn follows, so "
                    "turns cannot be taken out of the loss one by one"
                )
            counts[index] = len(before)
    ends = dict(zip(starts, [*starts[1:], len(messages)], strict=True))
    for index in turns:
        if counts[index] == counts[ends[index]]:
            raise Unmaskable(f"message {index}: the template writes no {{% generation %}} block for this turn")
    return [span for index in turns for span in whole.spans[counts[index] : counts[ends[index]]]]


def prefix_span(template: ChatTemplate, conversation: Conversation, whole: Rendered, turn: int) -> Span:
    """An assistant turn by the difference of two renderings, up to and with its end token.

    Args:
        turn: Index of the message.

    Raises:
        Unmaskable: The whole conversation does not begin with both renderings.
    """
    messages, tools = conversation.messages, conversation.tools
    prompt = template.render(messages[:turn], tools, prompt=True).text
    last = turn == len(messages) - 1
    upto = whole.text if last else template.render(messages[: turn + 1], tools).text
    if not upto.startswith(prompt):
        raise Unmaskable(
            f"message {turn}: the template does not begin this turn with its generation prompt{_at(upto, prompt)}"
        )
    if not whole.text.startswith(upto):
        raise Unmaskable(f"message {turn}: the template rewrites this turn when others follow{_at(whole.text, upto)}")
    return len(prompt), len(upto.rstrip())


def _at(text: str, prefix: str) -> str:
    """Where a text leaves what should be its beginning."""
    at = next((k for k, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))
    return f" ({prefix[at : at + 20]!r} becomes {text[at : at + 20]!r})"


def check_nothing_lost(message: Message, turn: int, text: str) -> None:
    """Refuses a turn of which the template leaves out content, reasoning or a call.

    Args:
        turn: The message's index, for the error.
        text: What the template wrote for the turn.

    Raises:
        Unmaskable: The message holds something that the text does not.
    """
    *thoughts, answer = re.split(r"</?think>", message["content"])
    parts = [("content", answer), *(("reasoning in the content", thought) for thought in thoughts)]
    parts += [(key, message[key]) for key in REASONING if isinstance(message.get(key), str)]
    parts += [
        (f"tool call {name}", name) for name in (call["function"]["name"] for call in message.get("tool_calls", ()))
    ]
    for part, value in parts:
        if value.strip() not in text:
            raise Unmaskable(
                f"message {turn}: its {part} ({value.strip()[:40]!r}) is not in what the template writes for it"
            )


def check_tools(tools: list[Any] | None, text: str) -> None:
    """Refuses a conversation whose tools the template does not write: the model would call what it never heard of."""
    for tool in tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            raise Unmaskable(f"the tool {name} is not in what the template writes")
