"""Text as tokens, and which tokens a stretch of it became."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache

from lora_converter.chat.folder import TokenizerFolder
from lora_converter.chat.formats import BadRecord
from lora_converter.chat.template import Span
from lora_converter.chat.turns import Unmaskable


class SharedToken(Unmaskable):
    """The first token of an answer also holds the end of its prompt, which is not how the model will meet them."""


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text.

    Attributes:
        places: For each, its first character and the one behind its last.
    """

    ids: list[int]
    places: list[Span]


class Tokens:
    """A tokenizer that answers for places in the text."""

    def __init__(self, folder: TokenizerFolder) -> None:
        self._tokenizer, self._added = folder.tokenizer, folder.added
        self._ids_of = lru_cache(1024)(lambda text: self.encode(text).ids)

    def encode(self, text: str) -> Encoding:
        """The tokens of a text, without any that it does not hold.

        Raises:
            BadRecord: The text is no Unicode.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises TypeError for half a surrogate pair, and bare Exceptions
            raise BadRecord(f"the text cannot be tokenized: {error}") from error
        return Encoding(encoding.ids, encoding.offsets)

    def cover(self, encoding: Encoding, span: Span) -> slice:
        """All tokens that hold something of a span; a letter may be several tokens."""
        first = bisect_right(encoding.places, span[0], key=lambda place: place[1])
        return slice(first, bisect_left(encoding.places, span[1], lo=first, key=lambda place: place[0]))

    def cover_answer(self, encoding: Encoding, text: str, span: Span, where: str) -> slice:
        """The same for an answer: it must begin with a token of its own and end with the end of a turn.

        Args:
            text: What `encoding` encodes. Up to `span` it is what the model reads before it answers.

        Raises:
            SharedToken: The tokens before the answer are not those that the prompt has when it stands alone.
            Unmaskable: The last token is not one that was added to the tokenizer.
        """
        tokens = self.cover(encoding, span)
        if not self._prompt_stands_alone(encoding, text[: span[0]], tokens.start):
            raise SharedToken(
                f"{where}: the first token of the answer ({text[span[0] :][:20]!r}) also holds the prompt's end"
            )
        if not self.ends(encoding, text, span):
            ending = text[span[0] : span[1]][-20:]
            raise Unmaskable(
                f"{where}: the template writes no end of turn behind {ending!r}: the model would never stop"
            )
        return tokens

    def ends(self, encoding: Encoding, text: str, span: Span) -> bool:
        """Whether the last token of a span, white space aside, was added to the tokenizer."""
        tokens = self.cover(encoding, (span[0], span[0] + len(text[span[0] : span[1]].rstrip())))
        return tokens.start < tokens.stop and encoding.ids[tokens.stop - 1] in self._added

    def _prompt_stands_alone(self, encoding: Encoding, prompt: str, count: int) -> bool:
        """Whether the first tokens are the prompt's. An added token cuts the text: what follows the last suffices."""
        ids = encoding.ids
        cut = next((k for k in range(count - 1, -1, -1) if ids[k] in self._added), 0)
        tail = prompt[encoding.places[cut][0] :] if cut < count else prompt
        return self._ids_of(tail) == ids[cut:count] or self.encode(prompt).ids == ids[:count]

    def split(self, prompt: str, answer: str) -> tuple[list[int], Encoding] | None:
        """Prompt and answer tokenized on their own, as the model meets them when it answers.

        Returns:
            None where the tokens do not stand for the text any more, as for tokenizers that begin with a space.
        """
        ids, encoding = self.encode(prompt).ids, self.encode(answer)
        joined = self._tokenizer.decode(ids + encoding.ids, skip_special_tokens=False)
        whole = self._tokenizer.decode(self.encode(prompt + answer).ids, skip_special_tokens=False)
        return (ids, encoding) if joined == whole else None
