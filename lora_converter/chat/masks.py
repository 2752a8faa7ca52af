"""Conversations as token ids with a mask of what is trained.

    record --formats--> messages --template--> text, spans of turns --tokenizer--> ids, trained

What is trained is what the model writes when it answers: the turn after the generation prompt, and its end token, or it
never learns to stop. The mask comes from places in the text, never from the value of a token: a padding token that is
the end token as well does no harm, and text that looks like a role does not either.

Nothing is trained that was not verified, see `turns`. In addition, without `{% generation %}` blocks: the tokens before
a turn are those of the prompt alone, which the model will have read when it answers; and the last one is a token of the
tokenizer's own, the end of the turn. Reasoning, calls and content that a template leaves out of a trained turn are
refused, never lost in silence; in turns that are only read they are the template's business.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_converter.chat.folder import open_tokenizer, template_source
from lora_converter.chat.formats import BadRecord, Completion, Conversation, example_of
from lora_converter.chat.settings import DATE, TrainOn, check_choice
from lora_converter.chat.template import ChatTemplate, Rendered, Span
from lora_converter.chat.tokens import Encoding, SharedToken, Tokens
from lora_converter.chat.turns import Unmaskable, check_nothing_lost, check_tools, prefix_span, tagged_spans

logger = logging.getLogger(__name__)

_DATE = datetime.date.fromisoformat(DATE)

_RULES = 1
"""Counts changes of what this room makes of the same input."""


class Example(NamedTuple):
    """What a model reads in one piece.

    Attributes:
        ids: (tokens,), uint32.
        trained: (tokens,), bool: the model learns to predict this token from those before it.
    """

    ids: npt.NDArray[np.uint32]
    trained: npt.NDArray[np.bool_]


class ChatTokenizer:
    """Makes examples of records. Not for several threads at once."""

    def __init__(
        self,
        folder: str | Path,
        *,
        template: str | Path = "",
        template_args: Mapping[str, Any] | None = None,
        train_on: TrainOn = "assistant",
        date: datetime.date = _DATE,
        vocab_size: int | None = None,
        new_tokens: Sequence[str] = (),
    ) -> None:
        """
        Args:
            folder: A Hugging Face folder with `tokenizer.json` and `tokenizer_config.json`.
            template: A Jinja file to use instead of the folder's template.
            template_args: Variables for the template, such as `enable_thinking`.
            date: What the template writes as today's date.
            vocab_size: Rows of the model's embedding: a token behind them is refused.
            new_tokens: Are added to the tokenizer.

        Raises:
            ValueError: A file is missing or damaged, or an argument is none of those allowed. A folder without a
                template will do for completions.
        """
        check_choice("train_on", train_on)
        self._files = open_tokenizer(folder, new_tokens)
        self._tokens = Tokens(self._files)
        self._train_on, self._date, self._vocab_size = train_on, date, vocab_size
        self._warned = False
        self._chat: ChatTemplate | None = None
        try:
            source = template_source(folder, template)
        except ValueError as error:
            if template or template_args:
                raise
            self._missing = str(error)
        else:
            self._chat = ChatTemplate(source, self._files.special, template_args or {}, date)

    @property
    def _template(self) -> ChatTemplate:
        """Needed by the first conversation only: completions have none."""
        if self._chat is None:
            raise ValueError(self._missing)
        return self._chat

    def encode(self, record: Mapping[str, Any]) -> list[Example]:
        """The examples of a record: one, or with `train_on = "each"` one per trained turn.

        Raises:
            ValueError: It is a conversation, and there is no template.
            BadRecord: Its format is unknown, the template cannot write it, or nothing in it would be trained.
            Unmaskable: A `BadRecord` whose template is to blame.
        """
        example = example_of(record)
        if isinstance(example, Completion):
            return [self._checked(*self._completion(example))]
        turns = [index for index, trained in enumerate(example.trained) if trained]
        if self._train_on == "last":
            turns = [turn for turn in turns if turn == _answers(example)[-1]]
        if not turns and self._train_on != "all":
            raise BadRecord("no token would be trained: the record takes out every assistant turn that could be")
        try:
            if self._train_on in ("last", "each"):
                return [self._one_turn(example, turn) for turn in turns]
            return [self._whole(example, turns)]
        except Unmaskable as error:
            raise Unmaskable(f"{error}. {self._remedy(example, turns)}") from error

    def _remedy(self, example: Conversation, turns: list[int]) -> str:
        """What to set so that a conversation can be trained on after all. What it names was tried."""
        try:
            if self._train_on == "assistant" and [self._one_turn(example, turn) for turn in turns]:
                return '[chat] train_on = "each" works: one example per turn'
        except BadRecord:
            pass
        wanted = "writes all of it" if self._template.tagged else "has {% generation %} blocks"
        return f"Set [chat] template to one that {wanted}"

    @property
    def added_tokens(self) -> dict[int, str]:
        """Id -> text of the tokens that are matched before a text is split, the ends of turns among them."""
        return {index: str(self._files.tokenizer.id_to_token(index)) for index in sorted(self._files.added)}

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return self._files.tokenizer.decode(list(ids), skip_special_tokens=False)

    def fingerprint(self) -> str:
        """16 hex digits that change when the same record may give other examples."""
        files, template = self._files, self._chat
        ids = files.tokenizer.get_vocab_size(with_added_tokens=True)
        limit = self._vocab_size if self._vocab_size is not None and self._vocab_size < ids else None
        date = self._date.isoformat() if template and template.writes_date else None
        chat = [template.source, template.variables, self._train_on, date] if template else [self._missing]
        parts = [_RULES, files.tokenizer.to_str(), files.first, files.end, limit, *chat]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _completion(self, example: Completion) -> tuple[list[int], list[bool]]:
        """The prompt's tokens, the completion's, and the end token: the latter two are trained."""
        end = self._files.end
        if end is None:
            raise BadRecord("a completion ends with the eos_token, and tokenizer_config.json names none that is one")
        prompt = self._files.first + self._tokens.encode(example.prompt).ids
        answer = self._tokens.encode(example.completion).ids
        answer = answer if answer[-1:] == [end] else [*answer, end]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _whole(self, example: Conversation, turns: list[int]) -> Example:
        """The conversation as one example."""
        whole = self._template.render(example.messages, example.tools)
        check_tools(example.tools, whole.text)
        return self._all_but(example, whole, turns) if self._train_on == "all" else self._only(example, whole, turns)

    def _one_turn(self, example: Conversation, turn: int) -> Example:
        """The conversation up to a turn, trained on this turn."""
        upto = Conversation(example.messages[: turn + 1], example.tools, example.trained[: turn + 1])
        whole = self._template.render(upto.messages, upto.tools)
        check_tools(upto.tools, whole.text)
        try:
            return self._only(upto, whole, [turn])
        except SharedToken:
            start, end = prefix_span(self._template, upto, whole, turn)
            prompt, answer = whole.text[:start], whole.text[start:]
            split = self._tokens.split(prompt, answer)
            if split is None:
                raise
            ids, encoding = split
            tokens = self._tokens.cover_answer(encoding, answer, (0, end - start), f"message {turn}")
            trained = [len(ids) <= k < len(ids) + tokens.stop for k in range(len(ids) + len(encoding.ids))]
            return self._checked(ids + encoding.ids, trained)

    def _only(self, example: Conversation, whole: Rendered, turns: list[int]) -> Example:
        """The conversation, trained on some turns."""
        encoding = self._tokens.encode(whole.text)
        trained = np.zeros(len(encoding.ids), dtype=np.bool_)
        for tokens in self._turns(example, whole, encoding, turns):
            trained[tokens] = True
        return self._checked(encoding.ids, trained)

    def _all_but(self, example: Conversation, whole: Rendered, turns: list[int]) -> Example:
        """The conversation, trained on every token except for the turns that the record takes out."""
        encoding = self._tokens.encode(whole.text)
        trained = np.ones(len(encoding.ids), dtype=np.bool_)
        for turn in turns:
            check_nothing_lost(example.messages[turn], turn, whole.text)
        out = [k for k in _answers(example) if k not in turns]
        for tokens in self._turns(example, whole, encoding, out) if out else ():
            trained[tokens] = False
        return self._checked(encoding.ids, trained)

    def _turns(self, example: Conversation, whole: Rendered, encoding: Encoding, turns: list[int]) -> Iterator[slice]:
        """The tokens of some turns."""
        if self._template.tagged:
            every = turns == _answers(example)
            spans = whole.spans if every else tagged_spans(self._template, example, whole, turns)
            for turn in turns:
                if example.trained[turn]:
                    check_nothing_lost(example.messages[turn], turn, whole.of(spans))
            self._warn_if_endless(encoding, whole, spans)
            yield from (self._tokens.cover(encoding, span) for span in spans)
            return
        for turn in turns:
            span = prefix_span(self._template, example, whole, turn)
            if example.trained[turn]:
                check_nothing_lost(example.messages[turn], turn, whole.of([span]))
            yield self._tokens.cover_answer(encoding, whole.text, span, f"message {turn}")

    def _warn_if_endless(self, encoding: Encoding, whole: Rendered, spans: Sequence[Span]) -> None:
        """Says once that a template's `{% generation %}` blocks leave out the end of the turn, as GLM's do."""
        if spans and not self._warned and not self._tokens.ends(encoding, whole.text, spans[-1]):
            self._warned = True
            logger.warning(
                "The {%% generation %%} blocks of the chat template do not end with a token that was added to the "
                "tokenizer, but with %r: the model will not learn to stop there.",
                whole.of(spans[-1:])[-20:],
            )

    def _checked(self, ids: Sequence[int], trained: Sequence[bool] | npt.NDArray[np.bool_]) -> Example:
        example = Example(np.asarray(ids, dtype=np.uint32), np.asarray(trained, dtype=np.bool_))
        if not example.trained.any():
            raise BadRecord("no token would be trained: the template writes nothing for the assistant")
        if self._vocab_size is not None and (largest := int(example.ids.max())) >= self._vocab_size:
            token = self._files.tokenizer.id_to_token(largest)
            raise BadRecord(f"token {largest} ({token!r}) is outside the model's vocabulary of {self._vocab_size}")
        return example


def _answers(example: Conversation) -> list[int]:
    """Indices of the assistant's messages."""
    return [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
