"""Rows of several conversations that cannot see each other: the document mask, for any model that takes FlexAttention.

The loader gives `documents` (rows, positions), a number for each conversation of a row, beside the tokens. The model's
own masks, causal, in windows or in blocks, hold within one conversation. The host carries what `get_attention_masks`
returns through pipelines, context parallelism and recomputation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, and_masks
from torchtitan.models import attention
from torchtitan.tools.logging import logger

DOCUMENTS = "documents"
"""Of the batch's inputs."""

_BLOCK = 128
"""Positions of a block of the mask, which context parallelism does not cut."""

PACKING = 'Set chat.packing = "none" for one conversation per row.'


def with_document_masks(model_cls: type) -> type:
    """The model's class, whose attention masks are cut where documents end, in batches that say where."""

    class WithDocumentMasks(model_cls):  # type: ignore[misc, valid-type]  # the class is known only here
        def get_attention_masks(self, input_batch: Any, tokenizer: Any, extra_inputs: Any = None) -> Any:
            masks = super().get_attention_masks(input_batch, tokenizer, extra_inputs)
            documents = (extra_inputs or {}).pop(DOCUMENTS, None)
            if documents is None:
                return masks
            if isinstance(masks, dict):
                return {name: _within_documents(mask, documents) for name, mask in masks.items()}
            return _within_documents(masks, documents)

    WithDocumentMasks.__name__ = WithDocumentMasks.__qualname__ = model_cls.__name__
    WithDocumentMasks.__module__ = model_cls.__module__
    return WithDocumentMasks


def _within_documents(mask: BlockMask, documents: torch.Tensor) -> BlockMask:
    def same_document(b: Any, h: Any, query: Any, key: Any) -> Any:
        return documents[b, query] == documents[b, key]

    rows, length = documents.shape
    return attention.create_attention_mask(
        and_masks(mask.mask_mod, same_document), rows, None, length, length, device=documents.device
    )


def on_local_heads(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`FlexAttentionWrapper.forward`, which sees each rank's own heads where it is given DTensors."""

    @functools.wraps(forward)
    def forward_on_local_heads(self: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
        if not isinstance(q, DTensor):
            return forward(self, q, k, v, **options)
        result = forward(self, q.to_local(), k.to_local(), v.to_local(), **options)

        def as_dtensor(value: torch.Tensor) -> DTensor:
            return DTensor.from_local(value, q.device_mesh, q.placements, run_check=False)

        return tuple(map(as_dtensor, result)) if isinstance(result, tuple) else as_dtensor(result)

    return forward_on_local_heads


def flex_arguments(model_args: Any, job_config: Any) -> Any:
    """A copy of the model's arguments with FlexAttention.

    Raises:
        ValueError: torchtitan has no FlexAttention for the model, or not under context parallelism, or not for rows of
            this length there.
    """
    model, seq_len = job_config.model.name, job_config.training.seq_len
    degree = job_config.parallelism.context_parallel_degree
    if not hasattr(model_args, "attn_type"):
        raise ValueError(f"{model} has no FlexAttention in torchtitan 0.2.2, which a document mask takes. {PACKING}")
    if degree > 1 and model != "llama3":
        raise ValueError(
            f"torchtitan 0.2.2 has no FlexAttention for {model} under context parallelism, which a document mask "
            f"takes. {PACKING}"
        )
    if degree > 1 and seq_len % (_BLOCK * degree):
        raise ValueError(
            f"training.seq_len = {seq_len}: a document mask under parallelism.context_parallel_degree = {degree} takes "
            f'a multiple of {_BLOCK * degree}. Set one, or chat.packing = "none".'
        )
    if model_args.attn_type != "flex":
        logger.info('Chat: FlexAttention in this job, for the document mask of chat.packing = "documents".')
    return dataclasses.replace(model_args, attn_type="flex", attn_mask_type="causal")
