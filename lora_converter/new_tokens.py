"""Rows of tokens on a whole model: put them there, and find them (`lora.new_tokens`; the modules: `token_rows.py`)."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
import torch.nn as nn

from lora_converter.adapted import adapt
from lora_converter.config import LoRAConfig
from lora_converter.names import owners, plain_modules
from lora_converter.swap import swap_class
from lora_converter.tensors import full_tensor, local_indices, local_part
from lora_converter.token_rows import ROWS, TiedHead, TokenRows, TokenRowsEmbedding, TokenRowsHead
from lora_converter.trained import trained_parameters
from lora_converter.vocabulary import check_grows, first_rows, grow, vocabularies

_GROWN = "lora_grown"
"""Of an embedding or a head that trains in full: how many rows the base has, and its name on any host."""


def check_token_rows(
    model: nn.Module, tokens: Sequence[int], config: LoRAConfig, *, adapted: Collection[str] = ()
) -> None:
    """Refuses a model or settings that rows of tokens do not go with.

    Args:
        tokens: Ids.
        config: Its `new_tokens` are text, which a host's tokenizer has made ids of.
        adapted: Linears that are to have an adapter.

    Raises:
        ValueError: There is text without ids, or an id below 0; an embedding or a head is among them, or is packed;
            or see `vocabularies` and `check_grows`.
    """
    if config.new_tokens and not tokens:
        raise ValueError(
            f"lora.new_tokens = {config.new_tokens}, and apply_lora has no tokenizer to know their ids by. Give it "
            "their ids: tokens = tokenizer.convert_tokens_to_ids(...)."
        )
    if wrong := [token for token in tokens if not isinstance(token, int) or token < 0]:
        raise ValueError(f"tokens = {list(tokens)}: {wrong} are no ids, which are integers from 0 on.")
    for fqn, module in vocabularies(model).items() if tokens else ():
        if fqn in adapted:
            raise ValueError(
                f"lora.new_tokens: {fqn} is to have an adapter, and rows of its own that train. Add {fqn} to "
                "lora.exclude_modules, or leave new_tokens out."
            )
        weight = cast(Any, module).weight
        if not weight.is_floating_point():
            raise ValueError(f"lora.new_tokens: {fqn} is quantized ({weight.dtype}), and no rows of it can train.")
    if tokens:
        check_grows(model, max(tokens) + 1)


def add_token_rows(
    model: nn.Module,
    tokens: Sequence[int],
    config: LoRAConfig,
    *,
    base_rows: int = 0,
    trained: Collection[str] = (),
    canonical_name: Callable[[str], str] = str,
    dtype: torch.dtype | None = None,
) -> None:
    """Lets rows of a model's embedding and head train, in place. Those that are not there are added, as zeros.

    Args:
        tokens: Ids, in any order; none for none.
        base_rows: How many rows the base has; as many as there are if 0.
        trained: Modules that train in full: all of their rows do, the added ones too.
        canonical_name: See `apply_lora`.
        dtype: Of d; fp32 if left out, or the weight's if that is wider.
    """
    if not tokens:
        return
    ids, embedding = tuple(sorted(set(tokens))), None
    modules = vocabularies(model)
    base_rows = base_rows or min(cast(Any, module).weight.shape[0] for module in modules.values())
    grow(model, ids[-1] + 1)
    in_full = {id(modules[fqn].weight) for fqn in trained if fqn in modules}
    for fqn, module in modules.items():
        if id(module.weight) in in_full:
            vars(module)[_GROWN] = (base_rows, canonical_name(fqn))
            continue
        if embedding is not None and module.weight is embedding.weight:
            tied = swap_class(module, TiedHead)
            tied.lora_embedding = [embedding]
            embedding.lora_tied.append(tied)
            embedding.updates_all_owners = True
            continue
        kind = TokenRowsEmbedding if isinstance(module, nn.Embedding) else TokenRowsHead
        rows: TokenRows = adapt(module, kind, config, fqn=fqn, canonical_name=canonical_name(fqn))
        rows.lora_token_ids, rows.lora_base_rows, rows.lora_rows_whole_over = ids, base_rows, None
        rows.lora_ids_there = {}
        wide = dtype or torch.promote_types(rows.weight.dtype, torch.float32)
        empty = torch.zeros(len(ids), rows.weight.shape[1], dtype=wide, device=rows.weight.device)
        rows.lora_token_rows = nn.Parameter(empty)
        if isinstance(rows, TokenRowsEmbedding):
            embedding, rows.lora_tied = rows, []


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Name of d -> module, in a pipeline stage or a wrapped model too."""
    return {f"{m.lora_fqn}.{ROWS}": m for m in model.modules() if isinstance(m, TokenRows)}


class GrownInFull:
    """The rows that were added to a weight that trains in full. They begin in the weight itself.

    Args:
        module: An embedding or a head, see `add_token_rows`.
    """

    def __init__(self, module: nn.Module):
        self.weight = cast(nn.Parameter, module.weight)
        self.base_rows, self._name = vars(module)[_GROWN]

    @torch.no_grad()
    def initial_rows(self, seed: int, *, computes: bool = True) -> torch.Tensor:
        """Where they begin, whole, (added rows, width). A collective, see `TokenRows.initial_rows`."""
        whole, ids = full_tensor(self.weight.detach()), range(self.base_rows, self.weight.shape[0])
        if not computes:
            return torch.zeros(len(ids), self.weight.shape[1], device=whole.device)
        return first_rows(whole, ids, base_rows=self.base_rows, name=self._name, seed=seed)

    @torch.no_grad()
    def set_initial_rows(self, rows: torch.Tensor) -> None:
        """Begins there, with this rank's part of them."""
        local, indices = local_part(self.weight), local_indices(self.weight, 0) - self.base_rows
        added = indices >= 0
        local[added.to(local.device)] = rows[indices[added].to(rows.device)].to(local)


def grown_in_full(model: nn.Module) -> dict[str, GrownInFull]:
    """Plain name of a weight that trains in full and has more rows than the base's, the first of its names -> those."""
    found: dict[int, tuple[str, GrownInFull]] = {}
    for fqn, module in plain_modules(model):
        if _GROWN in vars(module) and (grown := GrownInFull(module)).weight.shape[0] > grown.base_rows:
            found.setdefault(id(grown.weight), (f"{fqn}.weight", grown))
    return dict(found.values())


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of all that trains at the rate of `train_also`: what it names, and rows of tokens."""
    return trained_parameters(model) | {name: module.lora_token_rows for name, module in token_rows(model).items()}


def grown_weights(model: nn.Module) -> dict[str, int]:
    """Plain name of a weight that has more rows than the base's -> how many the base's has."""
    modules = token_rows(model).values()
    rows = {id(m.weight): m.lora_base_rows for m in modules if m.weight.shape[0] > m.lora_base_rows}
    rows |= {id(grown.weight): grown.base_rows for grown in grown_in_full(model).values()}
    return {name: rows[id(param)] for name, param in owners(model) if id(param) in rows}


def rows_of_tokens(head: nn.Module) -> TokenRows | None:
    """Where the rows of a head are that train, its own or those of the embedding that it is tied to."""
    if isinstance(head, TiedHead):
        return head.lora_embedding[0]
    return head if isinstance(head, TokenRows) else None
