"""PEFT's file form of adapters on stacked experts: parameters (experts, ., .) that it adapts by `target_parameters`.

    ...experts.base_layer.lora_A.weight    where two are adapted: of the one defined first, gate_up_proj
    ...experts.lora_A.weight               of the other, down_proj, or of the only one

The files do not say which parameter it is; `target_parameters` does. A is (experts · r, P), expert by expert, and B
(Q, r · experts), with the experts innermost. In memory they are (experts, r, P) and (experts, Q, r), under the full
name of the parameter.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

Pair = tuple[torch.Tensor, torch.Tensor]

INNER, OUTER = "gate_up_proj", "down_proj"
"""The parameters of transformers' stacked experts, in the order in which their modules define them."""

_BASE_LAYER = ".base_layer"


def from_file(
    pairs: Mapping[str, Pair], parameters: Iterable[str], rank_of: Callable[[str], int], what: str
) -> dict[str, Pair]:
    """The factors of a file, those on stacked experts in their form in memory; all others as they are.

    Args:
        pairs: Module, as the file's keys have it -> (A, B).
        parameters: The file's `target_parameters`.
        rank_of: Full name of a parameter -> its r.
        what: What is read, for messages.

    Raises:
        ValueError: It is not clear which parameter is meant, or shapes do not fit together.
    """
    parameters = list(parameters)
    factors = {}
    for module, pair in pairs.items():
        owner = module.removesuffix(_BASE_LAYER)
        named = _named(owner, parameters)
        if owner != module or _holds_experts(owner, parameters, pairs):
            name = f"{owner}.{_parameter(owner, named, pairs, is_inner=owner != module, what=what)}"
            factors[name] = _unfolded(name, pair, rank_of(name), what)
        else:
            factors[module] = pair
    _check_counts(factors, what)
    return dict(sorted(factors.items()))


def keys_in_file(factors: Mapping[str, Pair]) -> dict[str, str]:
    """Module, as a file's keys have it -> its name in memory.

    Raises:
        ValueError: Two parameters of a module are adapted, and PEFT's order of them is not known.
    """
    keys = {}
    leaves: dict[str, set[str]] = {}
    for name in stacked_names(factors):
        leaves.setdefault(_owner(name), set()).add(_leaf(name))
    for name, (a, _) in factors.items():
        if a.ndim != 3:
            keys[name] = name
            continue
        owner, several = _owner(name), leaves[_owner(name)]
        if several not in ({_leaf(name)}, {INNER, OUTER}):
            raise ValueError(f"{owner}: PEFT has no known order of {', '.join(sorted(several))}; {INNER}, {OUTER} has.")
        keys[owner + _BASE_LAYER * (len(several) == 2 and _leaf(name) == INNER)] = name
    return keys


def in_file(factor: torch.Tensor, letter: str) -> torch.Tensor:
    """A factor, A or B, in a file's form: two-dimensional."""
    if factor.ndim != 3:
        return factor
    return factor.flatten(0, 1) if letter == "A" else factor.permute(1, 2, 0).flatten(1)


def stacked_names(factors: Mapping[str, Pair]) -> list[str]:
    """The parameters among the modules of an adapter."""
    return [name for name, (a, _) in factors.items() if a.ndim == 3]


def is_weight(parameter: str) -> bool:
    """Whether one of `target_parameters` is a linear's weight, whose factors are those of any linear."""
    return _leaf(parameter) == "weight"


def _named(owner: str, parameters: list[str]) -> set[str]:
    """The parameters of a module that `target_parameters` names, by PEFT's rule of suffixes."""
    leaves = {_leaf(parameter) for parameter in parameters if not is_weight(parameter)}
    return {leaf for leaf in leaves if any(f".{owner}.{leaf}".endswith(f".{parameter}") for parameter in parameters)}


def _holds_experts(owner: str, parameters: list[str], pairs: Mapping[str, Pair]) -> bool:
    """Whether a module that has factors in a file is one of stacked experts, and no linear."""
    if owner + _BASE_LAYER in pairs or _leaf(owner) == "experts":
        return True
    owners = {_owner(parameter) for parameter in parameters if not is_weight(parameter)} - {""}
    return any(f".{owner}".endswith(f".{name}") for name in owners)


def _parameter(owner: str, named: set[str], pairs: Mapping[str, Pair], *, is_inner: bool, what: str) -> str:
    """Which parameter of a module the factors under its own name, or under `base_layer`, belong to."""
    both = owner + _BASE_LAYER in pairs
    if _leaf(owner) == "base_layer" or (both and owner not in pairs):
        raise ValueError(f"{what}: of {owner} only some factors are there. The file is incomplete, or nested deeper.")
    if both and named >= {INNER, OUTER}:
        return INNER if is_inner else OUTER
    if not both and len(named) == 1:
        return next(iter(named))
    found = f"names {', '.join(sorted(named))}" if named else "names none of its parameters"
    raise ValueError(
        f"{what}: {owner} has factors of {'two parameters' if both else 'one parameter'}, and target_parameters "
        f"{found}. It must say which are meant, as ['{owner}.{OUTER}'] does."
    )


def _unfolded(name: str, pair: Pair, rank: int, what: str) -> Pair:
    a, b = pair
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or not a.shape[0]:
        raise ValueError(
            f"{what}: {name}: lora_A is {tuple(a.shape)}, lora_B is {tuple(b.shape)}; with r = {rank} they must be "
            "(experts * r, .) and (., r * experts)."
        )
    experts = a.shape[0] // rank
    return a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).permute(2, 0, 1)


def _check_counts(factors: Mapping[str, Pair], what: str) -> None:
    """Refuses stacks of one module with several numbers of experts, as a wrong r gives them."""
    first: dict[str, str] = {}
    for name in stacked_names(factors):
        other = first.setdefault(_owner(name), name)
        (one, r, _), (two, s, _) = factors[other][0].shape, factors[name][0].shape
        if one != two:
            raise ValueError(f"{what}: {other} has {one} experts with r = {r}, and {name} {two} with r = {s}.")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
