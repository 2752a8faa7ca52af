"""Rows of tokens that a PEFT directory brings, for the modules of a run in which rows of these tokens train."""

import json

import torch

from lora_converter.hf.merge_keys import EMBEDDINGS, HEADS, last_part
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.tokenizer_files import tokens_named
from lora_converter.hf.trained_tokens import TokenRows, module_in, rows_in_copy
from lora_converter.ranks import union_over_ranks
from lora_converter.run.model import RunModel


def rows_of_tokens(
    model: RunModel, peft: PeftAdapter, adapter: StateDictAdapter, copies: dict[str, torch.Tensor], path: str
) -> dict[str, TokenRows]:
    """Weights of this rank -> the rows of tokens that a directory has. A collective.

    Tokens and modules that it has no rows of are left out: these begin as without an adapter.

    Args:
        adapter: The host's.
        copies: Whole weights that are in it, by the host's names; see `rows_in_copy`.
        path: Of the directory.

    Raises:
        ValueError: Rows of other tokens train here, or it has rows of a weight that the model has not.
    """
    _check_tokens(model.host.job.tokens, peft, path)
    found, used = {}, []
    for weight, module in model.token_modules().items():
        (key,) = adapter.to_hf({weight: torch.empty(module.weight.shape, device="meta")})
        copied = rows_in_copy(copies, module)
        name = module_in(peft.token_rows, key.removesuffix(".weight"))
        if name:
            used.append(name)
            found[weight] = peft.token_rows[name]
        elif copied:
            found[weight] = copied
    known = [peft.token_rows[name] for name in union_over_ranks(used)]
    if lost := [name for name, rows in peft.token_rows.items() if not any(rows.equals(each) for each in known)]:
        raise ValueError(
            f"lora.initial_adapter_path: {path} has trained rows of tokens of {', '.join(lost)} alone, which is no "
            "weight of its own here: the model's output head is its embedding."
        )
    return found


def _check_tokens(here: dict[str, int], peft: PeftAdapter, path: str) -> None:
    """Refuses a directory with rows of other tokens: other ids, or others by the names in its tokenizer."""
    there = sorted({token for rows in peft.token_rows.values() for token in rows.ids})
    in_full = {last_part(module) for module in peft.modules_to_save} & (HEADS | EMBEDDINGS)
    if not there and in_full:  # all rows: those of the tokens here must be of the same tokens
        there = sorted(here.values())
    named = tokens_named(path, there)
    if there and (there != sorted(here.values()) or any(here.get(name) != token for token, name in named.items())):
        names = [named.get(token, f"<token {token}>") for token in there]
        raise ValueError(
            f"lora.initial_adapter_path: {path} has trained rows of the tokens {there}, and rows of {here or 'none'} "
            f"train here. Set lora.new_tokens = {json.dumps(names)}."
        )
