"""The model's weights in Hugging Face's names and orders, asked of the model's own StateDictAdapter.

No table per model: `to_hf` is given index tensors instead of weights (`probes.py`), once for each dim, with each row's
number in it, then each column's. What comes back says under which names a weight is stored and which of its rows and
columns stand where (Llama's q and k rows are reordered for RoPE, stacked experts are taken apart).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lora_converter.hf.probes import along, ask, count, line_of, select


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
class HFPart:
    """A Hugging Face weight V that holds all or a block of a tensor T of the host.

    V's dim `dims[d]` has at i what T's dim d has at `indices[d][i]`, or at i, where `indices[d]` is None. Where
    `dims[d]` is None, all of V stands at the one index `indices[d][0]`, as an expert's matrix in (experts, out, in).
    """

    name: str
    """Of the weight, e.g. `model.layers.0.self_attn.q_proj.weight`."""

    shape: tuple[int, ...]
    """V's."""

    dims: tuple[int | None, ...]
    indices: tuple[torch.Tensor | None, ...]

    places: tuple[torch.Tensor | None, ...]
    """Of each of T's dims, the indices in V that are T's, where V holds others beside it; None if all of them."""


def hf_parts(adapter: StateDictAdapter, key: str, shape: tuple[int, ...]) -> list[HFPart]:
    """Where a tensor of the host stands in Hugging Face's model; several parts if it is split.

    Raises:
        ValueError: The adapter cannot express the tensor by itself, or does so by more than splitting it along one dim,
            reordering what is along a dim, and reordering dims.
    """
    every = [count(size) for size in shape]
    probes = [along(numbers, dim, shape) for dim, numbers in enumerate(every)]
    answers = [_convert(adapter, key, probes[0])]
    names = list(answers[0])
    if len(names) == 1 and answers[0][names[0]] is probes[0]:  # renamed, and otherwise passed through
        nothing = (None,) * len(shape)
        return [HFPart(names[0], shape, tuple(range(len(shape))), nothing, nothing)]
    answers += [_convert(adapter, key, probe) for probe in probes[1:]]
    parts = []
    for name in names:
        part = _part(name, [answer[name] for answer in answers], shape)
        if part is None:
            raise ValueError(_mixes(adapter, key, name))
        parts.append(part)
    if not _covers(parts, every):
        raise ValueError(f"{key}: {type(adapter).__name__} does not store each of its {shape[0]} rows once.")
    return parts


def hf_parts_together(adapter: StateDictAdapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[HFPart]]:
    """The same for tensors of as many dims that the adapter expresses together alone, as one weight that holds several.

    Args:
        shapes: The host's names -> shapes.

    Raises:
        ValueError: As `hf_parts`.
    """
    number = {key: torch.tensor(i, dtype=torch.int32) for i, key in enumerate(shapes)}
    what = ", ".join(shapes)
    owners = ask(adapter, {key: number[key].expand(shape) for key, shape in shapes.items()}, what)
    dims = range(len(next(iter(shapes.values()))))
    answers = [
        ask(adapter, {key: along(count(shape[dim]), dim, shape) for key, shape in shapes.items()}, what) for dim in dims
    ]
    parts: dict[str, list[HFPart]] = {key: [] for key in shapes}
    for name, owner in owners.items():
        split = line_of(owner)
        if split is None:
            raise ValueError(_mixes(adapter, what, name))
        dim, numbers = split
        for key, shape in shapes.items():
            own = (numbers == number[key]).nonzero().flatten().int()
            if not len(own):
                continue
            held = [answer[name] if dim is None else select(answer[name], dim, own) for answer in answers]
            part = _part(name, held, shape)
            if part is None:
                raise ValueError(_mixes(adapter, key, name))
            places = tuple(own if there == dim and dim is not None else None for there in part.dims)
            parts[key].append(replace(part, shape=tuple(owner.shape), places=places))
    for key, shape in shapes.items():
        if not _covers(parts[key], [count(size) for size in shape]):
            raise ValueError(f"{what}: {type(adapter).__name__} does not store each of their rows once.")
    return parts


def _part(name: str, answers: Sequence[torch.Tensor], shape: tuple[int, ...]) -> HFPart | None:
    """What a weight holds of a tensor, by the numbers of each dim that stand in it; None if it mixes them."""
    lines = [line for answer in answers if (line := line_of(answer)) is not None]
    dims, there = tuple(dim for dim, _ in lines), tuple(answers[0].shape)
    if len(lines) < len(shape) or any(size > 1 and dim not in dims for dim, size in enumerate(there)):
        return None
    pairs = zip((numbers for _, numbers in lines), map(count, shape), strict=True)
    indices = tuple(None if torch.equal(n, every) else n for n, every in pairs)
    return HFPart(name, there, dims, indices, (None,) * len(shape))


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
    key, shape = f"{fqn}.weight", (out_features, in_features)
    hf_names(adapter, fqn, out_features=out_features, in_features=in_features)  # which refuses what is no linear there
    linears = []
    for part in hf_parts(adapter, key, shape):
        rows, columns = (None if indices is None else indices.long() for indices in part.indices)
        held = (out_features if rows is None else len(rows), in_features if columns is None else len(columns))
        if part.dims[0] == 1 or part.dims[1] == 0 or part.shape != held:
            raise ValueError(_mixes(adapter, key, part.name))
        linears.append(HFLinear(part.name.removesuffix(".weight"), rows, columns))
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
    key = f"{fqn}.weight"
    converted = _convert(adapter, key, torch.empty(out_features, in_features, device="meta"))
    if not converted or any(value.ndim != 2 or not name.endswith(".weight") for name, value in converted.items()):
        names = ", ".join(converted) or "nothing"
        raise ValueError(f"{key}: {type(adapter).__name__} turns it into {names}, not into the weights of linears.")
    return [name.removesuffix(".weight") for name in converted]


def _convert(adapter: StateDictAdapter, key: str, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    return ask(adapter, {key: probe}, key)


def _mixes(adapter: StateDictAdapter, key: str, name: str) -> str:
    return f"{key}: {type(adapter).__name__} mixes rows and columns in {name}; no adapter fits that."


def _covers(parts: list[HFPart], every: list[torch.Tensor]) -> bool:
    """Whether parts hold each element once: each all of every dim, but for one along which they share it."""
    split = [dim for dim in range(len(every)) if not all(_are_all([part.indices[dim]], every[dim]) for part in parts)]
    if len(parts) == 1:
        return not split
    return len(split) == 1 and _are_all([part.indices[split[0]] for part in parts], every[split[0]])


def _are_all(found: list[torch.Tensor | None], every: torch.Tensor) -> bool:
    if found == [None]:
        return True
    return torch.equal(torch.cat([every if numbers is None else numbers for numbers in found]).sort().values, every)
