"""Rows of single tokens that were trained, as PEFT stores them: its `trainable_token_indices`.

    adapter_config.json    "trainable_token_indices": {"model.embed_tokens": [7, 320], "lm_head": [7, 320]}
    weights                base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta (2, width)

What PEFT calls a delta are the rows themselves, in place of the base's. PEFT takes each entry for the end of a module's
name, and a list for the embedding's tokens alone. Where a base ties its head, the embedding's rows are the head's.
"""

import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_converter.hf.folder import open_model
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.token_rows import TokenRows as VocabularyRows
from lora_converter.token_rows import TokenRowsEmbedding

logger = logging.getLogger(__name__)

FIELD = "trainable_token_indices"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")

_NOT_IN_VLLM = (
    "LoRA: the directory has trained rows of tokens (%s of %s), and vLLM 0.33 takes no such adapter: `lora-converter "
    "merge` makes a model that goes everywhere. PEFT loads it onto a base that is resized to %d rows first, where it "
    "has fewer: model.resize_token_embeddings(%d)."
)


@dataclass(frozen=True)
class TokenRows:
    """The trained rows of one module.

    Attributes:
        ids: Of the tokens.
        rows: (len(ids), width), what stands in place of the base's.
    """

    ids: list[int]
    rows: torch.Tensor

    @property
    def ascending(self) -> torch.Tensor:
        """The rows in the order of their ids."""
        return self.rows[sorted(range(len(self.ids)), key=self.ids.__getitem__)]

    def equals(self, other: "TokenRows") -> bool:
        """Whether it has the same rows of the same tokens. A file has a tied head's beside the embedding's."""
        return sorted(self.ids) == sorted(other.ids) and torch.equal(self.ascending, other.ascending)


def is_setting(value: Any) -> bool:
    """Whether `trainable_token_indices` is a list of ids, or a table from modules to such."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(
        isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        for ids in lists
    )


def take_token_rows(tensors: MutableMapping[str, torch.Tensor], setting: Any, path: str | Path) -> dict[str, TokenRows]:
    """Module -> its rows, of the tensors in a file, which are taken out of them.

    Args:
        setting: What the file's directory says as `trainable_token_indices`.

    Raises:
        ValueError: The tensors and the setting do not fit together.
    """
    found: dict[str, TokenRows] = {}
    for key in list(tensors):
        if not (match := _KEY.fullmatch(key)):
            continue
        module, rows = match["module"], tensors.pop(key)
        table = setting if isinstance(setting, dict) else {module: setting or []}
        ids = next((ids for name, ids in table.items() if module.endswith(name)), [])
        if rows.ndim != 2 or len(ids) != len(rows) or len(set(ids)) < len(ids) or not rows.is_floating_point():
            raise ValueError(
                f"{path}: {key} is {tuple(rows.shape)}, and {FIELD} names {len(set(ids))} tokens of {module}. "
                "The file is damaged."
            )
        found[module] = TokenRows(list(ids), rows)
    if setting and not found:
        raise ValueError(f"{path}: nothing of {FIELD} is in it. The file is incomplete.")
    return found


def to_file(token_rows: Mapping[str, TokenRows]) -> dict[str, torch.Tensor]:
    """The inverse: tensors by their keys."""
    return {f"base_model.model.{m}.token_adapter.trainable_tokens_delta": each.rows for m, each in token_rows.items()}


def to_setting(token_rows: Mapping[str, TokenRows]) -> dict[str, list[int]] | None:
    """`trainable_token_indices` of a file that is written."""
    return {module: each.ids for module, each in sorted(token_rows.items())} or None


def to_hf_modules(
    adapter: StateDictAdapter, rows: Mapping[str, torch.Tensor], ids: Iterable[int]
) -> dict[str, TokenRows]:
    """Rows by the host's names of their weights -> by Hugging Face's modules."""
    ids, found = list(ids), {}
    for weight, value in rows.items():
        (key,) = adapter.to_hf({weight: value})
        found[key.removesuffix(".weight")] = TokenRows(ids, value)
    if found:
        logger.warning(_NOT_IN_VLLM, len(ids), ", ".join(found), max(ids) + 1, max(ids) + 1)
    return found


def rows_in_copy(copies: MutableMapping[str, torch.Tensor], module: VocabularyRows) -> TokenRows | None:
    """Rows of tokens in the whole weight that PEFT stores of a vocabulary that was resized; None without a copy.

    In the copy they give way to the zeros that the model has behind its base's rows, and what it has behind the
    model's rows is dropped: so it is to be compared with the model's weight. The copy of a tied head goes.

    Args:
        copies: Name of a weight -> copy.
        module: The model's, whose tokens' rows train.
    """
    name, ids, of_model = f"{module.lora_fqn}.weight", module.lora_token_ids, module.weight.shape[0]
    tied = isinstance(module, TokenRowsEmbedding) and bool(module.lora_tied)
    copy = copies.get(name)
    if copy is None or len(copy) < of_model:
        return None
    for other in [n for n in copies if tied and n != name and torch.equal(copies[n], copy)]:
        del copies[other]
    copies[name] = copy[:of_model].clone()
    copies[name][[token for token in ids if token >= module.lora_base_rows]] = 0
    return TokenRows([*ids], copy[[*ids]])


def module_in(token_rows: Mapping[str, TokenRows], module: str) -> str | None:
    """A module's name in a file, which may be the end of its own or the other way round."""
    return next((name for name in token_rows if module.endswith(name) or name.endswith(module)), None)


def with_rows(weight: torch.Tensor, trained: TokenRows) -> torch.Tensor:
    """A weight with trained rows in place of its own, and more rows where their ids ask for it. Zeros between."""
    more = max(*trained.ids, len(weight) - 1) + 1 - len(weight)
    weight = torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])])
    weight[trained.ids] = trained.rows.to(weight.dtype)
    return weight


def stored_rows(folder: str | Path, key: str, ids: Iterable[int]) -> torch.Tensor:
    """Rows of a weight in a Hugging Face folder, (len(ids), width), fp32; zeros for those behind the last.

    Raises:
        ValueError: The weight is not there, or quantized.
    """
    model = open_model(folder)
    if key not in model.weights or not model.weights[key][1].is_float:
        raise ValueError(f"{folder} has no {key} that rows of tokens could be added to.")
    path, entry = model.weights[key]
    with safe_open(path, framework="pt") as file:
        weight = file.get_slice(key)
        rows = [weight[i : i + 1].float() if i < entry.shape[0] else torch.zeros(1, entry.shape[1]) for i in ids]
    return torch.cat(rows)
