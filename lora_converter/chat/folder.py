"""What a Hugging Face folder holds for conversations: the tokenizer, its special tokens, the chat template.

The tokenizer neither adds nor cuts nor pads anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lora_converter.files import read_json

TOKENIZER_FILE, CONFIG_FILE, SPECIAL_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer and what its folder says about it.

    Attributes:
        tokenizer: Without its post-processor: templates write the first token themselves, and a second one, or a second
            end, would be trained. Its truncation and padding are off.
        special: `bos_token`, `eos_token`, ... -> text, which templates read as variables.
        first: What the post-processor puts before a text without a template: the BOS token, or nothing.
        added: Ids of the tokens that are matched before the text is split. The end of a turn is one of them.
    """

    tokenizer: Tokenizer
    special: dict[str, str]
    first: list[int]
    added: frozenset[int]

    @property
    def end(self) -> int | None:
        """The id of the `eos_token`."""
        token = self.special.get("eos_token")
        return None if token is None else self.tokenizer.token_to_id(token)


def open_tokenizer(folder: str | Path, new_tokens: Sequence[str] = ()) -> TokenizerFolder:
    """Reads `tokenizer.json`, `tokenizer_config.json` and the older `special_tokens_map.json`.

    Args:
        new_tokens: Are added.

    Raises:
        ValueError: There is no `tokenizer.json`, it is damaged, or the files contradict each other.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}. Copy it from the model's Hugging Face folder, or write one with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    tokenizer = open_whole(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    older = read_json(folder / SPECIAL_FILE) if (folder / SPECIAL_FILE).is_file() else {}
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    _check_added(config, added, folder)
    add_tokens(tokenizer, new_tokens)
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    first = _first(tokenizer)
    tokenizer.post_processor = None
    return TokenizerFolder(tokenizer, _special({**older, **config}), first, frozenset(added))


def open_whole(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder with everything that its file says.

    Raises:
        ValueError: The file is damaged.
    """
    path = Path(folder) / TOKENIZER_FILE
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Adds tokens that are matched before a text is split, as they stand. What the tokenizer has stays as it is.

    They are not special: what a model writes is read with them, as a parser of tool calls must. A piece of a word is
    not added again: matched before the split, it would be cut out of every word that has it.
    """
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])


def _first(tokenizer: Tokenizer) -> list[int]:
    """What the post-processor puts before a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    places = [k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare]
    return whole[: places[0]] if places else []


def _special(config: dict[str, Any]) -> dict[str, str]:
    """`*_token` entries; each is text, or an object whose `content` is."""
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _check_added(config: dict[str, Any], added: dict[int, str], folder: Path) -> None:
    """transformers adds the tokens that `tokenizer_config.json` names and `tokenizer.json` lacks; we refuse them."""
    for index, token in config.get("added_tokens_decoder", {}).items():
        if added.get(int(index)) != token["content"]:
            raise ValueError(
                f"{folder}: token {index} is {token['content']!r} in {CONFIG_FILE}, and "
                f"{added.get(int(index), 'none that was added')!r} in {TOKENIZER_FILE}. Write both anew with "
                "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )


def template_source(folder: str | Path, template: str | Path = "") -> str:
    """The template's text: the file `template`, or the one of a Hugging Face folder.

    Raises:
        ValueError: There is none, or several of which none is the default.
    """
    folder = Path(folder)
    path = Path(template) if template else folder / TEMPLATE_FILE
    if template and not path.is_file():
        raise ValueError(f"[chat] template: there is no file {path}.")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
        if not isinstance(found, str):
            raise ValueError(
                f"{folder / CONFIG_FILE} has the chat templates {', '.join(map(str, named))} and no default. "
                "Write the one you want into a file and set [chat] template to its path."
            )
    if not isinstance(found, str):
        raise ValueError(
            f"{folder} has no chat template: neither {TEMPLATE_FILE} nor chat_template in {CONFIG_FILE}. "
            "Set [chat] template to the path of a Jinja file."
        )
    return found
