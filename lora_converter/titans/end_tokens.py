"""Tokens that a conversation ends its turns with, and that the base has never learned.

A base model with a chat template: its embedding and head have rows for the template's tokens, which its training never
touched. With the head frozen no adapter of the layers can make such a token likely, so the model will not stop.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torchtitan.tools.logging import logger

from lora_converter.adapted import AdaptedModule
from lora_converter.tensors import full_tensor
from lora_converter.token_rows import TokenRows

_SMALL = 0.1
"""Of the median norm of all rows: a row below it was never trained."""

_WEIGHTS = ("tok_embeddings", "output", "lm_head")
"""The hosts' names of embedding and head."""


@torch.no_grad()
def warn_of_untrained_tokens(model_parts: Sequence[nn.Module], tokens: dict[int, str]) -> None:
    """Logs which trained special tokens have rows that no training has touched. A collective where rows are sharded.

    Args:
        tokens: Id -> text of the special tokens that the loss is over.
    """
    found: dict[str, list[str]] = {}
    for part in model_parts:
        for name in _WEIGHTS:
            module = getattr(part, name, None)
            if module is None or (isinstance(module, AdaptedModule) and not isinstance(module, TokenRows)):
                continue
            trained = module.lora_token_ids if isinstance(module, TokenRows) else ()
            norms = full_tensor(torch.linalg.vector_norm(module.weight.float(), dim=1)).cpu()
            if bad := untrained(norms, [index for index in tokens if index not in trained]):
                found[name] = [tokens[index] for index in bad]
    for name, texts in found.items():
        logger.warning(
            f"Chat: the base's {name} has untrained rows for {', '.join(map(repr, texts))}, which end what is trained. "
            "They are frozen, so the model will hardly learn to stop. Use an instruct model, or a chat.template whose "
            "end token the base knows, or name them in lora.new_tokens, whose rows train."
        )


def untrained(norms: torch.Tensor, tokens: Iterable[int]) -> list[int]:
    """Those of some tokens whose rows are nearly zero, or of one norm with another of them.

    Args:
        norms: (vocabulary,): of all rows.
    """
    small = norms < _SMALL * norms.median()
    ids = [index for index in tokens if index < len(norms)]
    values = [float(norms[index]) for index in ids]
    return [i for i, value in zip(ids, values, strict=True) if bool(small[i]) or values.count(value) > 1]
