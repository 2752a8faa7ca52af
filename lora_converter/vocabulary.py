"""A model's vocabulary: its embedding of tokens and its output head, more rows for both, and where new rows begin."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora_converter.names import plain_modules, stable_hash
from lora_converter.swap import unswapped
from lora_converter.targets import OUTPUT_HEADS

EMBEDDINGS = {"tok_embeddings", "embed_tokens", "wte", "word_embeddings", "embed_in"}
"""Last parts of the names of modules that tokens are looked up in."""

_ROWS_AT_A_TIME = 2**14


def vocabularies(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> module of a model's embedding of tokens and of its output head, as far as it has them.

    Raises:
        ValueError: There are several embeddings or heads, or one computes in a way of its own.
    """
    found: dict[str, nn.Module] = {}
    kinds: tuple[tuple[Any, set[str]], ...] = ((nn.Embedding, EMBEDDINGS), (nn.Linear, OUTPUT_HEADS))
    for kind, names in kinds:
        own = {n: m for n, m in plain_modules(model) if n.rpartition(".")[2] in names and isinstance(m, kind)}
        if len(own) > 1:
            raise ValueError(f"lora.new_tokens: the model has several of a kind: {', '.join(own)}.")
        for name, module in own.items():
            plain: Any = unswapped(type(module))
            if plain.forward is not kind.forward or getattr(module, "max_norm", None) is not None:
                raise ValueError(
                    f"lora.new_tokens: {name} is a {type(module).__name__}, which computes in a way of its own."
                )
        found |= own
    if not any(isinstance(module, nn.Embedding) for module in found.values()):
        raise ValueError(f"lora.new_tokens: the model has no embedding of tokens ({', '.join(sorted(EMBEDDINGS))}).")
    return found


def grow(model: nn.Module, rows: int) -> None:
    """Makes a model's embedding and head of so many rows, in place, the new ones zeros. A tied weight stays tied.

    What a model of transformers says of its vocabulary, which its losses and `save_pretrained` go by, follows.

    Raises:
        ValueError: The head has a bias; nothing is changed.
    """
    grown: dict[int, nn.Parameter] = {}
    check_grows(model, rows)
    for module in vocabularies(model).values():
        old: Any = module.weight
        if rows <= old.shape[0]:
            continue
        if id(old) not in grown:
            larger = F.pad(old.detach(), (0, 0, 0, rows - old.shape[0]))
            grown[id(old)] = nn.Parameter(larger, requires_grad=old.requires_grad)
        module.weight = grown[id(old)]
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    config = getattr(model, "config", None)
    telling: tuple[Any, ...] = (model, config, getattr(config, "text_config", None)) if grown else ()
    for each in telling:
        if isinstance(said := getattr(each, "vocab_size", None), int) and said < rows:
            each.vocab_size = rows


def check_grows(model: nn.Module, rows: int) -> None:
    """Refuses a model whose embedding and head cannot get so many rows.

    Raises:
        ValueError: The head has a bias.
    """
    for fqn, module in vocabularies(model).items():
        if rows > cast(Any, module).weight.shape[0] and getattr(module, "bias", None) is not None:
            raise ValueError(f"lora.new_tokens: {fqn} has a bias, which is not grown.")


def first_rows(weight: torch.Tensor, ids: Sequence[int], *, base_rows: int, name: str, seed: int) -> torch.Tensor:
    """What is added to a weight's rows of tokens at the start, (ids, width), fp32: zeros for those of the base.

    Args:
        weight: Whole, of at least `base_rows` rows.
        name: Of the module on any host, which seeds the noise of new rows.
    """
    rows = torch.zeros(len(ids), weight.shape[1], device=weight.device)
    new = [k for k, token in enumerate(ids) if token >= base_rows]
    if new:
        rows[new] = mean_rows(weight[:base_rows], [stable_hash(f"{seed}:{name}:{ids[k]}") for k in new])
    return rows


def mean_rows(weight: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Where new rows begin: as transformers' `mean_resizing`, at the mean of the base's, and a little beside.

    The noise has a billionth of the covariance of the base's rows: a sum of them, each times a normal number, which
    has it exactly and takes no factorisation.

    Args:
        weight: The base's rows, (rows, width).
        seeds: Of the noise of each new row, which so depends on no layout and on no other row.

    Returns:
        (len(seeds), width), fp32.
    """
    mean = torch.stack([rows.sum(0, dtype=torch.float32) for rows in weight.split(_ROWS_AT_A_TIME)]).sum(0) / len(
        weight
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = mean.repeat(len(seeds), 1)
    for rows in weight.split(_ROWS_AT_A_TIME):  # no copy of all of them in fp32
        noise = torch.stack([torch.randn(len(rows), generator=generator) for generator in generators]).to(weight.device)
        found += math.sqrt(1e-9 / len(weight)) * (noise @ rows.float() - noise.sum(1, keepdim=True) * mean)
    return found
