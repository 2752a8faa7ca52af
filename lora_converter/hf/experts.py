"""Adapters on routed experts in the form in which a model stores its experts: one by one, or stacked.

Gate and up of rank r become one adapter of rank 2r on the stack of both, with A of the gate above that of up and B
block-diagonal, and the other way round. The alphas follow, so that each product keeps its scaling. How models store
experts stands in `expert_layouts.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.expert_layouts import StoredExperts, goes_over_second, layout_of, stored_experts
from lora_converter.hf.expert_patterns import SPELLINGS, alpha_for, split_expert
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.peft_config import PEFT_VERSION
from lora_converter.hf.stacked import INNER, OUTER, Pair, is_weight, stacked_names

Fitted = Iterator[tuple[str, Pair, float]]
"""Modules with their factors and alphas."""


def fit_experts(peft: PeftAdapter, stored: Mapping[str, Sequence[int]], *, model_type: str = "") -> PeftAdapter:
    """The same adapter with its experts in the form, and under the names, in which a model stores them.

    Stacked factors then go the way of PEFT 0.21. Modules that are no experts, and experts of layers that are not
    stored, stay as they are.

    Args:
        stored: Name of a weight -> shape, in Hugging Face's names.
        model_type: transformers'.

    Raises:
        ValueError: Factors do not fit the weights, or an expert of a stack is missing, or experts of a stack have
            several ranks or scalings, or an expert has a magnitude; all layers are named.
    """
    layers = {_plain(name): layer for name, layer in stored_experts(stored, layout_of(model_type)).items()}
    owners = {module: _owner(module, pair) for module, pair in peft.factors.items()}
    found = Aliases(layers, model_type).find_all(dict.fromkeys(filter(None, owners.values())))
    if not found:
        return peft
    groups = defaultdict(list)
    for module, owner in owners.items():
        groups[found.get(owner, "")].append(module)
    factors = {module: peft.factors[module] for module in groups[""]}
    alphas = {module: peft.alpha_of(module) for module in groups.pop("")}
    problems = []
    for owner, modules in groups.items():
        try:
            for module, pair, alpha in _fitted(peft, modules, layers[owner]):
                if module in factors:
                    raise ValueError("an expert is adapted by itself and in a stack")
                factors[module], alphas[module] = pair, alpha
        except ValueError as e:
            problems.append(f"{layers[owner].name}: {e}")
    if with_magnitude := sorted(peft.magnitudes.keys() - factors.keys()):
        problems.append(f"{', '.join(with_magnitude)}: an expert has no magnitude (DoRA)")
    if problems:
        raise ValueError("; ".join(problems))
    return replace(
        peft,
        factors=dict(sorted(factors.items())),
        alphas={module: alpha for module, alpha in alphas.items() if alpha != peft.alpha},
        target_modules=_targets(peft.target_modules, factors),
        target_parameters=[*filter(is_weight, peft.target_parameters), *sorted(stacked_names(factors))],
        peft_version=PEFT_VERSION,
    )


def _fitted(peft: PeftAdapter, modules: Iterable[str], layer: StoredExperts) -> Fitted:
    stacks = {module.rpartition(".")[2]: module for module in modules if peft.factors[module][0].ndim == 3}
    single = {parts[1:]: module for module in modules if (parts := split_expert(module))}
    if layer.spelling:
        for (number, product), module in single.items():
            yield (
                f"{layer.name}.{number}.{layer.spelling[_place(product)]}",
                peft.factors[module],
                peft.alpha_of(module),
            )
        yield from _taken_apart(peft, stacks, layer)
    else:
        for stack, (down, up) in _straight(peft, stacks, layer).items():
            yield f"{layer.name}.{stack}", _as_peft_has_it(down, up, layer), peft.alpha_of(stacks[stack])
        yield from _stacked(peft, single, layer)


def own_rank(peft: PeftAdapter, stack: str) -> int:
    """The rank that one product of a stack should have: down's, which stands alone, or else the adapter's."""
    down = f"{stack.rpartition('.')[0]}.{OUTER}"
    return peft.rank_of(down) if down in peft.factors else peft.rank


def shares_of_rank(b: torch.Tensor, outputs: Sequence[torch.Tensor | slice], expected: int) -> list[slice | None]:
    """Which part of a stack's rank belongs to each of the products that it holds; None of one that has no update.

    A block-diagonal B gives each its own part. Else they share all of it, as PEFT's own training leaves it. A zero B,
    before any training, may be either: the rank tells.

    Args:
        b: (experts, out_features, rank).
        outputs: Those of each product.
        expected: See `own_rank`.
    """
    rank, several = b.shape[-1], len(outputs)
    own = [b[:, places] for places in outputs]
    parts = [slice(i * rank // several, (i + 1) * rank // several) for i in range(several)]
    if not b.any():
        return list(parts) if rank == several * expected else [slice(0, rank)] * several
    pairs = zip(own, parts, strict=True)
    if rank % several == 0 and not any(o[..., : p.start].any() or o[..., p.stop :].any() for o, p in pairs):
        return list(parts)
    return [slice(0, rank) if each.any() else None for each in own]


def _taken_apart(peft: PeftAdapter, stacks: Mapping[str, str], layer: StoredExperts) -> Fitted:
    """Stacks as adapters of single experts."""
    for stack, (down, up) in _straight(peft, stacks, layer).items():
        products = layer.spelling[:2] if stack == INNER else layer.spelling[2:]
        width = up.shape[1] // len(products)
        outputs = [layer.outputs(half, width) for half in (0, 1)] if stack == INNER else [slice(None)]
        shares = shares_of_rank(up, outputs, own_rank(peft, stacks[stack]))
        for product, rows, kept in zip(products, outputs, shares, strict=True):
            if kept is None:
                continue
            alpha = alpha_for(peft.scaling_of(stacks[stack]), kept.stop - kept.start, use_rslora=peft.use_rslora)
            for number in range(layer.experts):
                yield f"{layer.name}.{number}.{product}", (down[number, kept], up[number, rows, kept]), alpha


def _stacked(peft: PeftAdapter, single: Mapping[tuple[int, str], str], layer: StoredExperts) -> Fitted:
    """Adapters of single experts as stacks. A product that an expert has no adapter for gets zeros."""
    numbers = {number for number, _ in single}
    if single and (odd := numbers ^ set(range(layer.experts))):
        raise ValueError(
            f"{layer.experts} experts are one weight of the model, and the adapter has "
            + ", ".join(f"{'none' if number < layer.experts else 'one'} for expert {number}" for number in sorted(odd))
        )
    for stack, places in ((INNER, (0, 1)), (OUTER, (2,))):
        here = {(n, _place(product)): m for (n, product), m in single.items() if _place(product) in places}
        if not here:
            continue
        if stack not in layer.weights:
            raise ValueError(f"{stack} is not in the model")
        settings = {(peft.rank_of(m), peft.alpha_of(m)) for m in here.values()}
        if len(settings) > 1:
            raise ValueError(f"experts of one weight have (rank, alpha) {', '.join(map(str, sorted(settings)))}")
        rank, (taken, given) = peft.rank_of(next(iter(here.values()))), layer.features(stack)
        width, total = given // len(places), rank * len(places)
        dtype = peft.factors[next(iter(here.values()))][0].dtype
        down, up = (
            torch.zeros(layer.experts, total, taken, dtype=dtype),
            torch.zeros(layer.experts, given, total, dtype=dtype),
        )
        for (number, place), module in here.items():
            a, b = peft.factors[module]
            if (a.shape[1], b.shape[0]) != (taken, width):
                raise ValueError(f"{module} is {b.shape[0]} x {a.shape[1]}, and in the model {width} x {taken}")
            half = places.index(place)
            kept = slice(half * rank, (half + 1) * rank)
            down[number, kept] = a
            up[number, layer.outputs(half, width) if stack == INNER else slice(None), kept] = b
        alpha = alpha_for(peft.scaling_of(next(iter(here.values()))), total, use_rslora=peft.use_rslora)
        yield f"{layer.name}.{stack}", _as_peft_has_it(down, up, layer), alpha


def _straight(peft: PeftAdapter, stacks: Mapping[str, str], layer: StoredExperts) -> dict[str, Pair]:
    """Stack -> factors over what experts take, (experts, rank, in), and over what they give, (experts, out, rank)."""
    if unknown := sorted(stacks.keys() - layer.weights.keys()):
        raise ValueError(f"{', '.join(unknown)} is not in the model")
    pairs = {stack: peft.factors[module] for stack, module in stacks.items()}
    if wrong := {a.shape[0] for a, _ in pairs.values()} - {layer.experts}:
        raise ValueError(f"{layer.experts} experts are in the model, and {wrong.pop()} in the adapter")
    dims = [((a.shape[2], b.shape[1]), layer.weights[stack]) for stack, (a, b) in pairs.items()]
    over_second = goes_over_second(dims, flagged=layer.layout.flagged, version=peft.peft_version)
    if over_second == layer.in_out:
        return pairs
    return {stack: (b.mT, a.mT) for stack, (a, b) in pairs.items()}


def _as_peft_has_it(down: torch.Tensor, up: torch.Tensor, layer: StoredExperts) -> Pair:
    """A and B of PEFT 0.21, of the factors over what experts take and give."""
    return (down, up) if layer.layout.flagged == layer.in_out else (up.mT, down.mT)


def _owner(module: str, pair: Pair) -> str:
    """The module that holds a layer's experts; empty of what is no expert."""
    if pair[0].ndim == 3:
        return _plain(module.rpartition(".")[0])
    parts = split_expert(module)
    return _plain(parts[0]) if parts else ""


def _plain(owner: str) -> str:
    """Mixtral's experts under the name that transformers 5 gives them."""
    return owner.replace(".block_sparse_moe.", ".mlp.")


def _place(product: str) -> int:
    """0 of a gate, 1 of an up projection, 2 of a down projection."""
    return next(spelling.index(product) for spelling in SPELLINGS if product in spelling)


def _targets(targets: Iterable[str], factors: Mapping[str, Pair]) -> list[str]:
    """`target_modules` of these factors: without products that are in stacks now, with those that are not any more."""
    products = {parts[2] for module in factors if (parts := split_expert(module))}
    names = {name for name in factors if factors[name][0].ndim == 2}
    ends = {name.rpartition(".")[2] for name in names}
    every = {product for spelling in SPELLINGS for product in spelling}
    kept = {target for target in targets if target in ends or target.rpartition(".")[2] not in every or target in names}
    return sorted(kept | products)
