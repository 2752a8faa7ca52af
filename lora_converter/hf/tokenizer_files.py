"""A tokenizer's files beside an adapter or a model whose vocabulary has tokens more than the base's."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_converter.files import read_json

logger = logging.getLogger(__name__)

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"

_FILES = (_TOKENIZER, _CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""What transformers reads of a fast tokenizer. What `tokenizer.json` has, older files repeat."""


def write_tokenizer(source: str | Path, tokens: Mapping[str, int], target: Path) -> None:
    """Copies a tokenizer, and adds tokens to it.

    Args:
        tokens: Token -> id.
        target: A folder that is there.

    Raises:
        ValueError: The tokenizer gives one of the tokens another id.
    """
    if not Path(source, _TOKENIZER).is_file():
        logger.warning("LoRA: %s has no %s, so no tokenizer with the new tokens is written.", source, _TOKENIZER)
        return
    from lora_converter.chat.folder import add_tokens, open_whole  # tokenizers is not needed elsewhere here

    tokenizer = open_whole(source)
    add_tokens(tokenizer, sorted(tokens, key=tokens.__getitem__))
    if other := {
        token: tokenizer.token_to_id(token) for token, i in tokens.items() if tokenizer.token_to_id(token) != i
    }:
        raise ValueError(f"{source} gives other ids to tokens than the training had: {other}, {dict(tokens)} there.")
    copy_tokenizer(source, target)
    tokenizer.save(str(target / _TOKENIZER))
    if (target / _CONFIG).is_file() and (config := read_json(target / _CONFIG)).get("added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
        plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=False)
        ours = {str(i): {"content": token, **plain} for token, i in tokens.items() if i in added}
        config["added_tokens_decoder"] = {**ours, **config["added_tokens_decoder"]}
        (target / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(source: str | Path, target: Path) -> bool:
    """Copies the files of a tokenizer. Returns whether there is one."""
    for name in _FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), target / name)
    return Path(source, _TOKENIZER).is_file()


def tokens_named(folder: str | Path, ids: Iterable[int]) -> dict[int, str]:
    """Id -> token, of those of some ids that a folder's tokenizer has; none without one."""
    known: dict[int, str] = {}
    if Path(folder, _TOKENIZER).is_file():
        from lora_converter.chat.folder import open_whole

        known = {index: token for token, index in open_whole(folder).get_vocab(with_added_tokens=True).items()}
    return {index: known[index] for index in ids if index in known}
