"""What an adapter does to routed experts, in one line per layer and product: how much, to which most, to which nothing.

    ...experts.*.up_proj  128 experts of 768 x 64  |update| 1.2e-02 to 4.4e-02 (expert 17), median 1.9e-02  untouched: 8

An expert that no token came to has B = 0 still. That is ordinary: it is untouched, and counts in none of the numbers.
No update is built, and of the base there is one expert's weight in memory at a time.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.tensors import is_finite


@dataclass(frozen=True)
class Expert:
    """One expert's part of an adapter, in one product.

    Attributes:
        a: (rank, columns) of the update.
        b: (rows, rank).
        weight: Key of the base's weight.
        row: Which of a stacked weight; None where each expert has its own.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: str
    row: int | None = None


Pair = tuple[torch.Tensor, torch.Tensor]
Products = dict[str, dict[int, Expert]]
"""Name of a layer's product -> number of an expert -> expert."""


def sorted_out(adapter: PeftAdapter) -> tuple[dict[str, Pair], Products]:
    """The linears of an adapter with their factors, and its experts, stacked or one by one (`...experts.3.up_proj`)."""
    linears: dict[str, Pair] = {}
    products: Products = {}
    for module, (a, b) in adapter.factors.items():
        parts, scaling = split_expert(module), adapter.scaling_of(module)
        if a.ndim == 3:
            products[module] = {e: Expert(a[e], b[e], scaling, module, e) for e in range(len(a))}
        elif parts:
            layer, number, product = parts
            products.setdefault(f"{layer}.*.{product}", {})[number] = Expert(a, b, scaling, f"{module}.weight")
        else:
            linears[module] = (a, b)
    return linears, {name: dict(sorted(experts.items())) for name, experts in sorted(products.items())}


def describe_product(
    name: str,
    experts: Mapping[int, Expert],
    *,
    weight_norm: Callable[[str, int | None], float] | None = None,
    packing_error: Callable[[str, int | None], float | None] | None = None,
) -> str:
    """The line of one product.

    Args:
        weight_norm: Key of a base weight and row, if it is stacked -> its norm; with it the line says how large the
            updates are beside the weights.
        packing_error: The same -> the norm of what packing changed in the weight, None if it was not packed.
    """
    one = next(iter(experts.values()))
    line = f"{name}  {len(experts)} experts of {one.b.shape[0]} x {one.a.shape[1]}"
    broken = [number for number, e in experts.items() if not (is_finite(e.a) and is_finite(e.b))]
    untouched = [number for number, e in experts.items() if not e.b.any()]
    norms = {
        number: update_norm(e.a, e.b, e.scaling)
        for number, e in experts.items()
        if number not in broken and number not in untouched
    }
    if norms:
        line += f"  |update| {_spread(norms, '.3e')}"
    if norms and weight_norm is not None:
        beside = {n: percent(norm, weight_norm(experts[n].weight, experts[n].row)) for n, norm in norms.items()}
        line += f"  {_spread(beside, '.3g')} % of |weight|"
    if norms and packing_error is not None:
        found = {n: packing_error(experts[n].weight, experts[n].row) for n in norms}
        errors = {n: error for n, error in found.items() if error is not None}
        ratios = {n: ratio(norms[n], error) for n, error in errors.items()}
        line += f"  |packing| {_spread(errors, '.3e')}  |update| / |packing| {_spread(ratios, '.3g')}" if errors else ""
    if untouched and len(untouched) < len(experts):
        line += f"  untouched: {_ranges(untouched)}"
    if broken:
        return f"{line}  NOT FINITE: {_ranges(broken)}"
    return line if any(norms.values()) else f"{line}  ALL ZERO"


def count_modules(linears: int, products: Products) -> str:
    """How many linears, and how many products of how many experts."""
    told = [f"{linears} linears"] if linears or not products else []
    if products:
        told.append(f"{len(products)} products of {span(map(len, products.values()))} experts")
    return " and ".join(told)


def update_norm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> float:
    """Frobenius norm of s · B A, from products of the rank's size: |B A|² = tr(Bᵀ B · A Aᵀ), in fp64.

    Args:
        a: (rank, columns).
        b: (rows, rank).
    """
    a, b = a.double(), b.double()
    squared = float(((b.t() @ b) * (a @ a.t())).sum())
    return scaling * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def span(values: Iterable[float]) -> str:
    """One number, or the smallest and the largest of several."""
    several = sorted(set(values))
    return f"{several[0]:g}" if len(several) == 1 else f"{several[0]:g} to {several[-1]:g}"


def percent(norm: float, weight: float) -> float:
    """How large an update is beside its weight; infinite beside a weight of zeros."""
    return 100 * ratio(norm, weight)


def ratio(norm: float, other: float) -> float:
    """One norm over the other; infinite over 0."""
    return norm / other if other else math.inf if norm else 0.0


def beside_error(norm: float, error: float | None) -> str:
    """What packing changed in a linear's weight, and how large its update is beside that."""
    return "" if error is None else f"  |packing| {error:.3e}  |update| / |packing| {ratio(norm, error):.3g}"


def _spread(values: Mapping[int, float], form: str) -> str:
    """Smallest, largest and whose it is, median."""
    largest = max(values, key=values.__getitem__)
    median = statistics.median(values.values())
    return f"{min(values.values()):{form}} to {values[largest]:{form}} (expert {largest}), median {median:{form}}"


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 7-9, 120`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
