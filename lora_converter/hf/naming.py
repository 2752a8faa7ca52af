"""The model's linears in Hugging Face's names and row orders, asked of the model's own StateDictAdapter.

No table per model: `to_hf` is given index tensors instead of weights, once with each row's number in it and once with
each column's. What comes back says under which names a weight is stored and which of its rows and columns stand where
(Llama's q and k rows are reordered for RoPE). One weight is asked at a time, in the smallest integer type that can
count its rows, and its answer is freed before the next.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class StateDictAdapter(Protocol):
    """What a host has for each of its models: state dicts in its own names to Hugging Face's and back."""

    hf_assets_path: str | None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The host's names -> Hugging Face's."""

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The inverse."""

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        """DCP's reader of the Hugging Face folder at `path`."""


@dataclass(frozen=True)
class HFLinear:
    """A Hugging Face linear that holds a linear's weight W of the host, or some of its rows: W[rows][:, columns].

    For the adapter of W that means B[rows] and A[:, columns].
    """

    name: str
    """Module name, e.g. `model.layers.0.self_attn.q_proj`."""

    rows: torch.Tensor | None
    """Row numbers of W in Hugging Face's order; None if all of them in W's own."""

    columns: torch.Tensor | None
    """Column numbers of W in Hugging Face's order; None if all of them in W's own."""


def hf_linears(adapter: StateDictAdapter, fqn: str, *, out_features: int, in_features: int) -> list[HFLinear]:
    """Where the weight of a linear of the host stands in Hugging Face's model; several linears if it is split by rows.

    Raises:
        ValueError: The adapter cannot express the weight, or does so by more than reordering and splitting rows and
            reordering columns.
    """
    key = f"{fqn}.weight"
    all_rows, all_columns = _count(out_features), _count(in_features)
    rows = _ask(adapter, key, all_rows[:, None].expand(out_features, in_features))
    if rows is None:  # renamed, and otherwise passed through
        return [HFLinear(hf_name(adapter, fqn, out_features=out_features, in_features=in_features), None, None)]
    columns = _ask(adapter, key, all_columns[None, :].expand(out_features, in_features))
    assert columns is not None
    linears = []
    for name, numbers in rows.items():
        row, column = numbers[:, 0].clone(), columns[name][0].clone()
        moved_whole = torch.equal(numbers, row[:, None].expand_as(numbers))
        if not moved_whole or not torch.equal(columns[name], column[None, :].expand_as(columns[name])):
            raise ValueError(f"{key}: {type(adapter).__name__} mixes rows and columns in {name}; no adapter fits that.")
        module = name.removesuffix(".weight")
        linears.append(HFLinear(module, _unless_equal(row, all_rows), _unless_equal(column, all_columns)))
    covered = torch.cat([all_rows.long() if linear.rows is None else linear.rows for linear in linears])
    if not torch.equal(covered.sort().values, all_rows.long()):
        raise ValueError(f"{key}: {type(adapter).__name__} does not store each of its {out_features} rows once.")
    return linears


def hf_name(adapter: StateDictAdapter, fqn: str, *, out_features: int, in_features: int) -> str:
    """Name of the one Hugging Face linear that holds a linear of the host, without a look at its rows.

    Raises:
        ValueError: There is none, or several.
    """
    names = hf_names(adapter, fqn, out_features=out_features, in_features=in_features)
    if len(names) != 1:
        raise ValueError(f"{fqn}.weight: {type(adapter).__name__} splits it into {', '.join(names)}.")
    return names[0]


def hf_names(adapter: StateDictAdapter, fqn: str, *, out_features: int, in_features: int) -> list[str]:
    """Names of the Hugging Face linears that hold a linear of the host's weight, without a look at its rows.

    Raises:
        ValueError: There is none.
    """
    converted = _convert(adapter, f"{fqn}.weight", torch.empty(out_features, in_features, device="meta"))
    return [name.removesuffix(".weight") for name in converted]


def _ask(adapter: StateDictAdapter, key: str, numbers: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """`to_hf` of one weight, as matrices of row or column numbers by name; None if it comes back as it went in."""
    converted = _convert(adapter, key, numbers)
    return None if len(converted) == 1 and next(iter(converted.values())) is numbers else converted


def _convert(adapter: StateDictAdapter, key: str, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        converted = adapter.to_hf({key: probe})
    except Exception as e:
        raise ValueError(f"{key}: {type(adapter).__name__} cannot express it in Hugging Face's terms ({e!r}).") from e
    if not converted or any(value.ndim != 2 or not name.endswith(".weight") for name, value in converted.items()):
        names = ", ".join(converted) or "nothing"
        raise ValueError(f"{key}: {type(adapter).__name__} turns it into {names}, not into the weights of linears.")
    return converted


def _count(size: int) -> torch.Tensor:
    """0, 1, ..., size - 1 in the smallest type that can count so far."""
    return torch.arange(size, dtype=torch.int16 if size <= torch.iinfo(torch.int16).max else torch.int32)


def _unless_equal(numbers: torch.Tensor, in_order: torch.Tensor) -> torch.Tensor | None:
    return None if torch.equal(numbers, in_order) else numbers.long()
