"""A weighted sum of adapters as one: of each module that one of them adapts, Δ = w₁ s₁ B₁ A₁ + w₂ s₂ B₂ A₂ + ...

    concatenated   A = [A₁; A₂; ...]      B = [g₁ B₁, g₂ B₂, ...]     gᵢ = wᵢ sᵢ / s    rank r₁ + r₂ + ...
    truncated      A = √(Σ / s) Vᵀ        B = U √(Σ / s)              of the R largest singular values Σ of Δ

s is one scaling for all modules: of the |wᵢ sᵢ| the most common, and of several the largest. The factors of those
adapters are taken over bit for bit, of the others A is and B is rounded once. Servers that read `r` and `lora_alpha`
alone have the right scaling too. Sums are taken in fp64 on matrices of the ranks' size: of B and Aᵀ the QR
decompositions, of the small product the singular values. Nothing of a weight's size is made.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from lora_converter.hf.expert_patterns import alpha_for, linears_like_experts, split_expert
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.stacked import is_weight
from lora_converter.tensors import is_finite

Tensor = torch.Tensor

_CANCELS = 1e-12
"""A sum so much smaller than its terms is what rounding in fp64 leaves of zero."""

_NEARLY_CANCELS = 1e-6
"""The share of squares below which their sum, taken in fp64, has fewer than 10 digits."""


@dataclass(frozen=True)
class Deviation:
    """How far one module's written update is from the sum, as Frobenius norms; of stacked experts over all.

    Attributes:
        error: Of the difference: what truncation and rounding to the dtype have changed.
        norm: Of the sum. 0 where the terms cancel; then so is the update.
        full_rank: Of the terms together.
    """

    error: float
    norm: float
    full_rank: int


@dataclass(frozen=True)
class _Terms:
    """The terms of one module, side by side.

    Attributes:
        a: (rank, in_features), or (experts, rank, P).
        b: (out_features, rank), or (experts, Q, rank), fp64: the sum is s · b a.
        size: Norm that the sum would have, were the terms orthogonal.
    """

    a: Tensor
    b: Tensor
    size: float


def weighted_sum(
    adapters: Sequence[PeftAdapter], weights: Sequence[float], *, rank: int | None, dtype: torch.dtype
) -> tuple[PeftAdapter, dict[str, Deviation]]:
    """The sum, in the first adapter's other settings, and how exact it is.

    Args:
        adapters: With the same names for the same modules. Of the first the base and the settings of training.
        rank: At most so much per module, by the best approximation of the sum; all of it if None.
        dtype: Of the result's factors. What overflows in it stays in fp64.

    Raises:
        ValueError: Adapters have different shapes for a module; all are named.
    """
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    _check_shapes(adapters, modules)
    scaling = _common_scaling(adapters, weights)
    factors, deviations = {}, {}
    for module in modules:
        terms = _terms(adapters, weights, module, scaling)
        factors[module], deviations[module] = _as_one(terms, scaling, rank, dtype)
    ranks = {module: a.shape[-2] for module, (a, _) in factors.items()}
    highest = max(ranks.values())
    alphas = {own: alpha_for(scaling, own, use_rslora=False) for own in {*ranks.values()}}
    targets, parameters = _targets(adapters, factors)
    result = replace(
        adapters[0],
        factors=factors,
        rank=highest,
        alpha=alphas[highest],
        alphas={module: alphas[own] for module, own in ranks.items() if alphas[own] != alphas[highest]},
        use_rslora=False,
        target_modules=targets,
        target_parameters=parameters,
        base_weights={},
        modules_to_save=[],
    )
    return result, deviations


def _check_shapes(adapters: Sequence[PeftAdapter], modules: Iterable[str]) -> None:
    problems = []
    for module in modules:
        pairs = [adapter.factors[module] for adapter in adapters if module in adapter.factors]
        shapes = [(*b.shape[:-1], a.shape[-1]) for a, b in pairs]
        if len({*shapes}) > 1:
            problems.append(f"{module} is {' and '.join(str(shape) for shape in dict.fromkeys(shapes))}")
    if problems:
        raise ValueError(f"The adapters are of different models: {'; '.join(problems)}.")


def _common_scaling(adapters: Sequence[PeftAdapter], weights: Sequence[float]) -> float:
    """See the top of the file; 1 where all weights are 0."""
    counts = Counter(
        abs(weight * adapter.scaling_of(module))
        for adapter, weight in zip(adapters, weights, strict=True)
        if weight
        for module in adapter.factors
    )
    return max(counts, key=lambda scaling: (counts[scaling], scaling), default=1.0)


def _terms(adapters: Sequence[PeftAdapter], weights: Sequence[float], module: str, scaling: float) -> _Terms:
    """Those of weight 0 are left out, but for one if there is no other."""
    here = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if module in adapter.factors]
    here = [term for term in here if term[1]] or here[:1]
    downs, ups, squared = [], [], 0.0
    for adapter, weight in here:
        a, b = adapter.factors[module]
        ups.append(b.double() * (weight * adapter.scaling_of(module) / scaling))
        downs.append(a.double())
        squared += product_norm(ups[-1], downs[-1]) ** 2
    return _Terms(torch.cat(downs, dim=-2), torch.cat(ups, dim=-1), math.sqrt(squared))


def _as_one(
    terms: _Terms, scaling: float, rank: int | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Deviation]:
    """The factors that are written for a module, A and B, and how far they are from its terms."""
    a, b, full = terms.a, terms.b, terms.a.shape[-2]
    norm = product_norm(b, a)
    if norm <= _CANCELS * terms.size:
        return (_rounded(a[..., :rank, :], dtype), _rounded(0 * b[..., :rank], dtype)), Deviation(0.0, 0.0, full)
    left, right = (b, a) if rank is None or full <= rank else truncated(b, a, rank)
    written = _rounded(right, dtype), _rounded(left, dtype)
    own_a, own_b = (factor.double() for factor in written)
    if torch.equal(own_a, a):
        difference = b - own_b, a
    else:
        difference = torch.cat([b, -own_b], dim=-1), torch.cat([a, own_a], dim=-2)
    return written, Deviation(scaling * product_norm(*difference), scaling * norm, full)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of left · right of a rank, fp64, as two factors of the same size.

    Args:
        left: (..., rows, k).
        right: (..., k, columns).
    """
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, values, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    roots = values[..., None, :rank].sqrt()
    return q_left @ (u[..., :rank] * roots), (q_right @ (v.mT[..., :rank] * roots)).mT


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left · right, fp64, right to 10 digits of the sum's or 16 of its largest term's.

    By the products of columns with each other; where the terms of the sum cancel, which those do not survive, by QR.
    """
    of_left, of_right = left.mT @ left, right @ right.mT
    squared = float((of_left * of_right).sum())
    if squared > _NEARLY_CANCELS * float((_diagonal(of_left) * _diagonal(of_right)).sum()):
        return math.sqrt(squared)
    _, r_left = torch.linalg.qr(left, mode="r")
    _, r_right = torch.linalg.qr(right.mT, mode="r")
    return float((r_left @ r_right.mT).norm())


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = value.to(dtype)
    return rounded if is_finite(rounded) else value


def _targets(adapters: Sequence[PeftAdapter], factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters`: whole names, since the model that shorter ones mean is not here.

    Single experts go by the names of their products, as PEFT with transformers 5 wants them, and linears that it would
    take for experts by their weights.
    """
    linears = [module for module, (a, _) in factors.items() if a.ndim == 2 and not split_expert(module)]
    products = {parts[2] for module in factors if (parts := split_expert(module))}
    weights = [f".{name}" for adapter in adapters for name in adapter.target_parameters if is_weight(name)]
    as_weights = {module for module in linears if any(f".{module}.weight".endswith(name) for name in weights)}
    if len(linears) < len(factors):
        as_weights |= {*linears_like_experts(linears)}
    stacks = [module for module, (a, _) in factors.items() if a.ndim == 3]
    return (
        sorted({*linears} - as_weights | products),
        [*(f"{module}.weight" for module in sorted(as_weights)), *stacks],
    )
