"""PEFT's `rank_pattern` and `alpha_pattern`: expressions of which the first that matches a name's end counts."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_converter.hf.expert_patterns import expert_patterns

Tables = tuple[dict[str, int], dict[str, float]]
"""`rank_pattern` and `alpha_pattern`."""


def match_pattern(table: Mapping[str, Any], module: str, default: Any, what: str) -> Any:
    """What one of PEFT's tables gives to a module: the first key that matches the name or a dotted end of it.

    A module that is adapted as a parameter goes by its weight's name there.

    Args:
        table: `rank_pattern` or `alpha_pattern`.
        what: The table, for messages.

    Raises:
        ValueError: A key is no regular expression.
    """
    for key, value in table.items():
        if key == module:  # which most expressions are, once an adapter has been written here
            return value
        try:
            found = re.match(rf"(.*\.)?({key})$", module) or re.match(rf"(.*\.)?({key})$", f"{module}.weight")
        except re.error as e:
            raise ValueError(f"{what}: {key!r} is no regular expression ({e}).") from None
        if found:
            return value
    return default


def patterns_of(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rank: int,
    alpha: float,
    *,
    use_rslora: bool = False,
    as_parameters: Iterable[str] = (),
) -> Tables:
    """The tables that give each module its rank and alpha, where the adapter's own are `rank` and `alpha`.

    Args:
        ranks: Of every adapted module.
        alphas: The same modules'.
        as_parameters: See `exact_pattern`.
    """
    of_experts, covered = expert_patterns(ranks, alphas, rank, alpha, use_rslora=use_rslora)
    own_ranks = {module: own for module, own in ranks.items() if module not in covered}
    own_alphas = {module: alphas[module] for module in own_ranks}
    names = list(ranks)
    return (
        {**of_experts[0], **exact_pattern(own_ranks, rank, names, as_parameters=as_parameters)},
        {**of_experts[1], **exact_pattern(own_alphas, alpha, names, as_parameters=as_parameters)},
    )


def exact_pattern(
    values: Mapping[str, Any], default: Any, everything: Iterable[str], *, as_parameters: Iterable[str] = ()
) -> dict[str, Any]:
    """A table of PEFT's that gives each module its value, and every other one of `everything` the default.

    Keys are whole names. PEFT takes them for expressions that also match at a dotted end: a name that is the end of
    another module's gets an expression that matches nothing else, so that the order, which PEFT changes when it saves,
    does not matter. Modules that PEFT adapts as parameters, named in `as_parameters` by their weights, go by either
    name: other loaders know them as modules.
    """
    parameters = {name.removesuffix(".weight") for name in as_parameters if name.endswith(".weight")}
    others = [module for module, value in values.items() if value != default]
    by_end: dict[str, list[str]] = {_last(module): [] for module in others}
    for name in everything:
        if _last(name) in by_end:
            by_end[_last(name)].append(name)
    table = {}
    for module in sorted(others):
        key = module if _means_one(module, by_end[_last(module)]) else rf"(?<!\.){re.escape(module)}"
        table[key + r"(\.weight)?" * (module in parameters)] = values[module]
    return table


def _means_one(name: str, everything: Iterable[str]) -> bool:
    """Whether a name, as PEFT's expression, matches itself and none of the others that end in the same part."""
    if not re.fullmatch(r"\w*", _last(name)):
        return False
    try:
        expression = re.compile(rf"(.*\.)?({name})$")
    except re.error:
        return False
    return bool(expression.match(name)) and not any(expression.match(m) for m in everything if m != name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
