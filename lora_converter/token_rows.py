"""Rows of an embedding and of an output head that train while the rest is frozen, `lora.new_tokens`.

    E' = E + Pᵀ d        E frozen [rows, width], d = lora_token_rows [tokens, width], P one row of a one for each token

A token that the base has begins where it is, d = 0. For one that the base has not E is grown by rows of zeros, and d
begins where transformers' `mean_resizing` puts a new row (`mean_rows`). Nothing as large as E is copied or saved: the
embedding looks d up beside E, and the head adds a few columns to its logits.

Under tensor parallelism d is whole on every rank, each of which deals with the tokens whose rows of E it has: its
gradient is then a partial sum, as that of a whole factor (`tensor_parallel.py`). No collective is added.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lora_converter.adapted import AdaptedModule
from lora_converter.swap import class_below, reduced
from lora_converter.tensor_parallel import local_bias, local_input, local_output
from lora_converter.tensors import copy_full_, full_tensor, local_indices, local_part
from lora_converter.vocabulary import first_rows

ROWS = "lora_token_rows"
"""The parameter, under every kind."""


class TokenRows(AdaptedModule):
    """What an embedding's or a head's class gains. Made by `add_token_rows` alone.

    Attributes:
        lora_token_rows: d, (tokens, width).
        lora_token_ids: Of which tokens, ascending.
        lora_base_rows: How many rows the base has. Those behind are zeros in `weight`.
    """

    adapter_kind = "vocabularies"
    adapter_parameter_names = (ROWS,)
    peft_rows = ROWS

    weight: torch.Tensor
    lora_token_rows: nn.Parameter
    lora_token_ids: tuple[int, ...]
    lora_base_rows: int
    lora_rows_whole_over: DeviceMesh | None
    lora_ids_there: dict[torch.device, torch.Tensor]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, but a tensor-parallel shard of d becomes Replicate."""
        if name == ROWS and isinstance(param, DTensor) and param.placements == (Shard(0),):
            self.lora_rows_whole_over = param.device_mesh
            whole = distribute_tensor(self.lora_token_rows.detach(), param.device_mesh, [Replicate()])
            param = nn.Parameter(whole, requires_grad=self.lora_token_rows.requires_grad)
        super().register_parameter(name, param)

    def reset_adapter(self, seed: int) -> None:
        """d is zero until the base is known."""
        with torch.no_grad():
            self.lora_token_rows.zero_()

    def merged_names(self) -> list[str]:
        return ["weight"]

    def local_updates(self, weight: str) -> Iterator[torch.Tensor]:
        """Pᵀ d, some rows at a time."""
        rows = full_tensor(self.lora_token_rows.detach()).float()
        place = {token: k for k, token in enumerate(self.lora_token_ids)}
        for indices in local_indices(self.weight, 0).split(2**14):
            update = rows.new_zeros(len(indices), rows.shape[1])
            here = [(k, place[token]) for k, token in enumerate(indices.tolist()) if token in place]
            if here:
                update[[k for k, _ in here]] = rows[[k for _, k in here]]
            yield update

    def whole_over(self) -> dict[str, DeviceMesh]:
        mesh = self.lora_rows_whole_over
        return {} if mesh is None else {ROWS: mesh}

    def reset_from_base(self, seed: int) -> None:
        self.set_initial_rows(self.initial_rows(seed))

    @torch.no_grad()
    def initial_rows(self, seed: int, *, computes: bool = True) -> torch.Tensor:
        """Where d begins, whole, (tokens, width): where a new row does, for tokens that the base has not.

        A collective, with the base in place.

        Args:
            computes: False on ranks that are sent what another one computes: zeros.
        """
        whole, name = full_tensor(self.weight.detach()), self.lora_canonical_name
        if not computes:
            return torch.zeros(self.lora_token_rows.shape, device=whole.device)
        return first_rows(whole, self.lora_token_ids, base_rows=self.lora_base_rows, name=name, seed=seed)

    def set_initial_rows(self, rows: torch.Tensor) -> None:
        """Begins there."""
        copy_full_(self.lora_token_rows, rows)

    def remove_adapter(self) -> None:
        for name in (ROWS, "lora_token_ids", "lora_base_rows", "lora_rows_whole_over", "lora_ids_there"):
            delattr(self, name)

    def token_ids(self, device: torch.device) -> torch.Tensor:
        """(tokens,), int64, made once for each device."""
        if device not in self.lora_ids_there:
            self.lora_ids_there[device] = torch.tensor(self.lora_token_ids, device=device)
        return self.lora_ids_there[device]

    def first_row(self) -> int:
        """Of `weight`, of those that this rank has under tensor parallelism."""
        mesh = self.lora_rows_whole_over
        return 0 if mesh is None else mesh.get_local_rank() * math.ceil(self.weight.shape[0] / mesh.size())

    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the logits that this rank has: which are those of tokens, (tokens), and d of these, (tokens, width)."""
        d, first = local_part(self.lora_token_rows), self.first_row()
        # A slice, since ids ascend and shards are contiguous. One without a token still has a gradient, of zeros.
        start, stop = (bisect_left(self.lora_token_ids, row) for row in (first, first + len(local_part(self.weight))))
        return self.token_ids(d.device)[start:stop] - first, d[start:stop]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained rows={len(self.lora_token_ids)}"

    @torch.no_grad()
    def base_rows(self) -> torch.Tensor:
        """The base's rows of the tokens, whole, (tokens, width), fp32. A collective, of all ranks with this weight."""
        indices, local = local_indices(self.weight, 0), local_part(self.weight)
        place = {int(token): k for k, token in enumerate(indices)}
        rows = torch.zeros(len(self.lora_token_ids), local.shape[1], dtype=torch.float32, device=local.device)
        for k, token in enumerate(self.lora_token_ids):
            if token in place:
                rows[k] = local[place[token]]
        if isinstance(self.weight, DTensor):
            mesh = self.weight.device_mesh
            rows = rows.to(mesh.device_type)
            for dim, placement in enumerate(self.weight.placements):
                if not placement.is_replicate():
                    torch.distributed.all_reduce(rows, group=mesh.get_group(dim))
        return rows

    def whole_rows(self) -> torch.Tensor:
        """What PEFT stores: the rows themselves, (tokens, width), fp32. A collective."""
        rows = self.base_rows()
        return rows + full_tensor(self.lora_token_rows.detach()).to(rows)

    @torch.no_grad()
    def set_whole_rows(self, rows: torch.Tensor, ids: Sequence[int]) -> None:
        """The inverse, of some of the tokens. A collective."""
        base, changes = self.base_rows(), full_tensor(self.lora_token_rows.detach()).clone()
        places = [self.lora_token_ids.index(token) for token in ids]
        changes[places] = rows.to(changes) - base[places].to(changes)
        copy_full_(self.lora_token_rows, changes)


class TokenRowsEmbedding(TokenRows):
    """An `nn.Embedding`.

    Attributes:
        lora_tied: The heads that have the same weight, and with it the same d.
    """

    lora_tied: list["TiedHead"]

    def remove_adapter(self) -> None:
        super().remove_adapter()
        for head in self.lora_tied:
            head.__class__ = class_below(type(head), TiedHead)
            del head.lora_embedding
        del self.lora_tied
        self.__dict__.pop("updates_all_owners", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (...), ids -> (..., width)."""
        if not self.is_active:
            return super().forward(input)
        mesh = self.lora_rows_whole_over
        if mesh is None:
            out = super().forward(input)
            return (out + self._rows_of(input, local_part(self.lora_token_rows))).to(out.dtype)
        ids, weight = local_part(input), local_part(self.weight)
        place = ids - self.first_row()
        here = ((place >= 0) & (place < len(weight))).unsqueeze(-1)
        out = F.embedding(place.clamp(0, len(weight) - 1), weight)
        out = ((out + self._rows_of(ids, local_part(self.lora_token_rows))) * here).to(out.dtype)
        return local_output(out, mesh, column_wise=False, out_features=out.shape[-1])

    def _rows_of(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """d of each position; zeros for tokens that have none."""
        tokens = self.token_ids(ids.device)
        place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        place = torch.where(tokens[place] == ids, place, len(tokens))
        return F.embedding(place, F.pad(rows, (0, 0, 0, 1)), padding_idx=len(tokens))


class TokenRowsHead(TokenRows):
    """An `nn.Linear` from hidden states to logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., width) -> (..., rows)."""
        return logits_of(cast(Any, self), self, input, super().forward)


class TiedHead(nn.Module):
    """What the class of a head gains whose weight is the embedding's: its logits have the embedding's d.

    Attributes:
        lora_embedding: The embedding, in a list so that it is no child.
    """

    lora_embedding: list[TokenRowsEmbedding]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, super().__reduce_ex__(2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., width) -> (..., rows)."""
        return logits_of(cast(Any, self), self.lora_embedding[0], input, super().forward)


def logits_of(
    head: nn.Linear, rows: TokenRows, x: torch.Tensor, of_base: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The logits of a head, and those of d added to them in place.

    Args:
        rows: Where d is.
        x: (..., width).
        of_base: The head's own forward.
    """
    if not rows.is_active:
        return of_base(x)
    mesh = rows.lora_rows_whole_over
    if mesh is None:
        return _add_columns(of_base(x), x, *rows.columns())
    x, bias = local_input(x, mesh, column_wise=True), local_bias(head.bias, mesh, column_wise=True)
    logits = F.linear(x, local_part(head.weight), bias)
    logits = _add_columns(logits, x, *rows.columns())
    return local_output(logits, mesh, column_wise=True, out_features=head.out_features)


def _add_columns(logits: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits.index_add_(-1, columns, F.linear(x, rows.to(x.dtype)).to(logits.dtype))
