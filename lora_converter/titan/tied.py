"""FSDP2 over a model whose output head is its embedding: one weight is in one group of modules."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn

_EMBEDDING = "_lora_tied_embedding"
"""Of a head: a tuple of the embedding, so that it is no module below the head."""

_HAS_HEAD = "_lora_is_tied"
"""Of that embedding."""


def mark_tied_head(model: nn.Module) -> None:
    """Has a model's embedding and head sharded together, if they share their weight."""
    embedding, head = (getattr(model, name, None) for name in ("tok_embeddings", "output"))
    if embedding is not None and head is not None and embedding.weight is head.weight:
        setattr(embedding, _HAS_HEAD, True)
        setattr(head, _EMBEDDING, (embedding,))


def shard_tied_together(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    """`fully_shard`, which torchtitan calls for the embedding, and later for the last norm and the head."""

    @functools.wraps(fully_shard)
    def shard(module: Any, **kwargs: Any) -> Any:
        if not isinstance(module, list):
            return module if hasattr(module, _HAS_HEAD) else fully_shard(module, **kwargs)
        tied = [embedding for each in module for embedding in getattr(each, _EMBEDDING, ())]
        return fully_shard([*tied, *module], **kwargs)

    return shard
