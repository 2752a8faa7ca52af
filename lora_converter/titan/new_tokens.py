"""`[lora] new_tokens` in torchtitan: tokens in the tokenizer, rows in the model.

A flavor says how many rows its model has, and the tokenizer how many tokens there are; torchtitan compares the two
nowhere. New tokens come behind those of the tokenizer, where a base that is padded has rows for them already. Tokens
whose ids are not below the flavor's rows get rows of their own, also without `new_tokens`. A base that has more rows
than the flavor, one that such a training was merged into say, gives the model as many.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec
from torchtitan.tools.logging import logger

from lora_converter.chat.folder import add_tokens
from lora_converter.dcp.reader import read_metadata
from lora_converter.hf.folder import open_model
from lora_converter.run.job import Base
from lora_converter.titan.job import NAME
from lora_converter.vocabulary import grow, vocabularies

_TOKENIZER = "lora_tokenizer"


def with_new_tokens(get_train_spec: Callable[[str], Any]) -> Callable[[str], Any]:
    """`get_train_spec`, whose specs build tokenizers that know the tokens of `[lora] new_tokens`."""

    @functools.wraps(get_train_spec)
    def get_with_new_tokens(name: str) -> Any:
        spec = get_train_spec(name)
        build = spec.build_tokenizer_fn
        if build is None:
            return spec

        def build_with_new_tokens(job_config: Any) -> Any:
            tokenizer = build(job_config)
            if tokens := new_tokens_of(job_config):
                add_tokens(tokenizer.tokenizer, tokens)
            if NAME in job_config.model.converters:
                setattr(job_config, _TOKENIZER, tokenizer)
            return tokenizer

        return dataclasses.replace(spec, build_tokenizer_fn=build_with_new_tokens)

    return get_with_new_tokens


def new_tokens_of(job_config: Any) -> list[str]:
    """Those of a job with adapters."""
    has_adapters = NAME in job_config.model.converters and hasattr(job_config, NAME)
    return job_config.lora.new_tokens if has_adapters else []


def has_rows_for_all(job_config: Any) -> bool:
    """Whether the model of a job gets rows for all tokens that its tokenizer has."""
    return NAME in job_config.model.converters


def trained_tokens(job_config: Any, rows: int) -> dict[str, int]:
    """Token -> id, of those whose rows train.

    Args:
        rows: Of the model's embedding.

    Raises:
        ValueError: The model has no tokenizer to add tokens to.
    """
    tokens = new_tokens_of(job_config)
    tokenizer = getattr(job_config, _TOKENIZER, None)
    if tokens and tokenizer is None:
        build = train_spec.get_train_spec(job_config.model.name).build_tokenizer_fn
        if build is None:
            raise ValueError(f"lora.new_tokens = {tokens}: {job_config.model.name} has no tokenizer to add them to.")
        tokenizer = build(job_config)
    inner: Any = getattr(tokenizer, "tokenizer", None)
    found = {token: inner.token_to_id(token) for token in tokens} if tokens else {}
    if inner is not None and inner.get_vocab_size() > rows:
        found |= {token: index for token, index in inner.get_vocab().items() if index >= rows}
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def rows_of_base(base: Base | None, adapter: Any, model: nn.Module) -> int:
    """How many rows a job's base has for tokens; as many as its model has where that cannot be told here.

    Args:
        adapter: The model's StateDictAdapter, if it has one.
    """
    embedding: Any = getattr(model, "tok_embeddings", None)
    if embedding is None:
        return 0
    name, rows = "tok_embeddings.weight", int(embedding.num_embeddings)
    try:
        if base is not None and base.format == "dcp":
            stored: Any = read_metadata(base.path).state_dict_metadata.get(name)
            return int(stored.size[0]) if stored else rows
        if base is not None and adapter is not None:
            (key,) = adapter.to_hf({name: torch.empty(embedding.weight.shape, device="meta")})
            weights = open_model(base.path).weights
            return int(weights[key][1].shape[0]) if key in weights else rows
    except (ValueError, OSError):  # a folder that is damaged, or none of the format that is said: its own check tells
        pass
    return rows


def grow_host(model: nn.Module, rows: int) -> None:
    """Gives a model of torchtitan's so many rows, on the meta device, and says so where torchtitan asks."""
    grow(model, rows)
    host: Any = model
    host.vocab_size = rows
    host.model_args = dataclasses.replace(host.model_args, vocab_size=rows)


def make_room(model: nn.Module, tokens: dict[str, int], parallel_dims: ParallelDims) -> int:
    """Gives a model rows for tokens, on the meta device.

    Returns:
        How many rows it had.

    Raises:
        ValueError: The model or the layout cannot have them.
    """
    modules = vocabularies(model)
    weights = {id(module.weight) for module in modules.values()}
    if parallel_dims.pp_enabled and len(weights) < len(modules):
        raise ValueError(
            "lora.new_tokens with a tied output head and pipeline parallelism: the embedding and the head would be on "
            "two stages, each with rows of its own. Set parallelism.pipeline_parallel_degree = 1."
        )
    rows = min(cast(Any, module).weight.shape[0] for module in modules.values())
    wanted = max(rows, max(tokens.values()) + 1)
    if wanted > rows:
        grow_host(model, wanted)
    there = sum(index < rows for index in tokens.values())
    logger.info(
        f"LoRA: rows of {len(tokens)} tokens train, {there} of them of the base's {rows:,} rows and "
        f"{len(tokens) - there} new ones; the vocabulary has {wanted:,}."
    )
    return rows
