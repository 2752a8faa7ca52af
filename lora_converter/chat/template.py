"""Chat templates: Jinja programs that write a conversation as one text, rendered as transformers renders them.

A template comes with a model, from whoever published it, so it runs in Jinja's immutable sandbox, without a loop, a
repetition or an output that has no end. `strftime_now` writes a date that is given, not today's: data that is prepared
again is the same. What stands between `{% generation %}` and `{% endgeneration %}` is what the model would write; the
characters are recorded.

The format: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lora_converter.chat.formats import BadRecord, Message

Span = tuple[int, int]
"""Characters of a text: the first, and the one behind the last."""

_ROUNDS, _CHARACTERS = 10_000_000, 1 << 25
"""Rounds of `range` that a rendering may ask for, and characters that it or one repetition may have."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        spans: What `{% generation %}` blocks wrote, in order.
    """

    text: str
    spans: tuple[Span, ...]

    def of(self, spans: Sequence[Span]) -> str:
        return "".join(self.text[start:end] for start, end in spans)


class ChatTemplate:
    """A compiled template.

    Attributes:
        tagged: It has `{% generation %}` blocks.
        writes_date: It calls `strftime_now`.
        variables: Special tokens and arguments that it reads.
        reads_parts: It expects content as a list of parts, as templates of models that see images may.
    """

    def __init__(self, source: str, special: Mapping[str, str], args: Mapping[str, Any], date: datetime.date) -> None:
        """
        Args:
            special: The tokenizer's special tokens.
            args: The user's variables, such as `enable_thinking`.
            date: What `strftime_now` writes.

        Raises:
            ValueError: The template is no Jinja, or does not take one of the user's variables.
        """
        self._environment = _Environment(date)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"The chat template is no Jinja: line {error.lineno}: {error.message}.") from error
        words = set(re.findall(r"\w+", source))
        if unread := sorted(args.keys() & _GIVEN | args.keys() - words):
            read = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
            names = ", ".join(sorted(read - special.keys() - _GIVEN)) or "none"
            raise ValueError(
                f"[chat] template_args: {', '.join(unread)}: the template does not take it. It may take: {names}."
            )
        self.variables = {name: value for name, value in {**special, **args}.items() if name in words}
        self.source, self.tagged = source, self._environment.tagged
        self.writes_date, self.reads_parts = "strftime_now" in source, False
        self.reads_parts = not self._writes("probe") and self._writes([{"type": "text", "text": "probe"}])

    def _writes(self, content: Any) -> bool:
        try:
            return "probe" in self._render([{"role": "user", "content": content}], None, False).text
        except BadRecord:
            return False

    def render(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False) -> Rendered:
        """The conversation as text.

        Args:
            prompt: Ends with what the model reads before it answers (`add_generation_prompt`).

        Raises:
            BadRecord: The template refuses the conversation, or fails on it.
        """
        if self.reads_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self._render(messages, tools, prompt)

    def _render(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> Rendered:
        pieces: list[str] = []
        spans = self._environment.start()
        fields = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            for piece in self._template.generate({**self.variables, **fields}):
                pieces.append(piece)
                self._environment.wrote(piece)
        except Exception as error:  # a template is a program: it may raise anything
            raise BadRecord(f"the chat template {_failure(error)}") from error
        text = "".join(pieces)
        if any(text[start : start + len(block)] != block for start, block in spans):
            raise BadRecord(
                "the chat template writes a {% generation %} block into a variable: where it stands is unknown"
            )
        return Rendered(text, tuple((start, start + len(block)) for start, block in spans if block))


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
"""Variables that come from the data."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with what chat templates call, and with limits.

    Attributes:
        tagged: A template compiled here has `{% generation %}` blocks.
    """

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, date: datetime.date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.tagged, self._length, self._rounds = False, 0, 0
        self._spans: list[tuple[int, str]] = []
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise, "strftime_now": date.strftime}
        self.globals |= {"range": self._range, "namespace": _Namespace}

    def start(self) -> list[tuple[int, str]]:
        """Begins a rendering; the list gets what its `{% generation %}` blocks write, and where."""
        self._spans, self._length, self._rounds = [], 0, 0
        return self._spans

    def wrote(self, piece: str) -> None:
        self._length += len(piece)
        if self._length > _CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it writes more than {_CHARACTERS:,} characters")

    def block(self, caller: Callable[[], str]) -> str:
        """Writes a `{% generation %}` block and records it."""
        start, text = self._length, caller()
        self._spans.append((start, str(text)))
        return text

    def _range(self, *bounds: int) -> range:
        rounds = range(*bounds)
        self._rounds += len(rounds)
        if self._rounds > _ROUNDS:
            raise jinja2.TemplateRuntimeError(f"it asks for more than {_ROUNDS:,} rounds of range()")
        return rounds

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = max((len(side) for side in (left, right) if isinstance(side, str | list | tuple)), default=0)
        times = max((side for side in (left, right) if isinstance(side, int)), default=0)
        if size * times > _CHARACTERS or (operator == "**" and (size or times > 1000)):
            raise jinja2.TemplateRuntimeError(f"it computes {str(left)[:20]!r} {operator} {str(right)[:20]!r}")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The `{% generation %}` tag: a call block, so that its text is known before it is written."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.tagged = True  # type: ignore[attr-defined]  # it is an _Environment
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.Call(nodes.EnvironmentAttribute("block"), [], [], None, None)
        return nodes.CallBlock(block, [], [], body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's `namespace`, which takes no names of Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as text. Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise _Refusal(message)


class _Refusal(jinja2.TemplateError):
    """What a template raises with `raise_exception`."""


def _failure(error: Exception) -> str:
    if isinstance(error, _Refusal):
        return f"refuses the conversation: {error}"
    if isinstance(error, RecursionError):
        return "fails: its macros call each other without end"
    return f"fails on the conversation: {type(error).__name__}: {error}"
