"""From patterns to the exact set of linears and experts, or an error that lists what there is.

A selector that matches nothing is a mistake in a file that somebody will pay GPU hours for, so it is an error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeVar

ALL_LINEAR = "all-linear"

V = TypeVar("V", int, float)

OUTPUT_HEADS = {"output", "lm_head"}
_ROUTER_GATES = {"gate", "router"}


def select_targets(
    linears: Sequence[str], *, targets: Sequence[str], exclude: Sequence[str] = (), experts: Sequence[str] = ()
) -> list[str]:
    """Names of the linears and of the experts' weights that get an adapter, in the order given.

    Args:
        linears: Fully qualified names (FQNs) of all linears of the model.
        targets: Patterns to adapt (see `LoRAConfig.target_modules`).
        exclude: Patterns to leave out.
        experts: FQNs of the weights of routed experts, `layers.1.moe.experts.w1`.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left after `exclude`.
    """
    included = _match_all("lora.target_modules", targets, linears, experts=experts, means=targets_weight)
    excluded = _match_all("lora.exclude_modules", exclude, linears, experts=experts)
    selected = [fqn for fqn in (*linears, *experts) if fqn in included and fqn not in excluded]
    if not selected:
        raise ValueError(
            f"lora.exclude_modules = {list(exclude)} leaves nothing of lora.target_modules = {list(targets)}: "
            f"nothing would be adapted. Exclude fewer of {_names([*linears, *experts])}."
        )
    return selected


def look_up(
    option: str,
    table: Mapping[str, V],
    linears: Mapping[str, V],
    experts: Mapping[str, V] = MappingProxyType({}),
) -> dict[str, V]:
    """The number that a table of patterns gives to each of the adapted modules.

    Args:
        option: `lora.rank_pattern` or `lora.alpha_pattern`, for messages.
        linears: Adapted linears -> what they have if no pattern matches.
        experts: Adapted modules of routed experts, likewise. A pattern must name them, as a target must.

    Raises:
        ValueError: A pattern matches none of them, or two give one of them different numbers.
    """
    found: dict[str, tuple[str, V]] = {}
    for pattern, value in table.items():
        hits = [fqn for fqn in (*linears, *experts) if reaches(pattern, fqn, is_experts=fqn in experts)]
        if not hits:
            also = f", and experts have one number per module: {', '.join(experts)}" if experts else ""
            raise ValueError(_nothing(option, pattern, "adapted linear", linears, also))
        for fqn in hits:
            other, before = found.setdefault(fqn, (pattern, value))
            if before != value:
                raise ValueError(f"{option}: {other!r} gives {fqn} {before}, {pattern!r} gives it {value}. Keep one.")
    return {fqn: found[fqn][1] if fqn in found else default for fqn, default in {**linears, **experts}.items()}


def reaches(pattern: str, fqn: str, *, is_experts: bool) -> bool:
    """Whether a pattern of a table means an adapted module."""
    return targets_weight(pattern, f"{fqn}.") if is_experts else matches(pattern, fqn)


def reaches_weight(pattern: str, weight: str) -> bool:
    """Whether a pattern means a weight of routed experts: by its own name, or by that of the module."""
    return pattern != ALL_LINEAR and (matches(pattern, weight) or matches(pattern, weight.rpartition(".")[0]))


def targets_weight(pattern: str, weight: str) -> bool:
    """Whether a target means a weight of routed experts: it reaches it, and one of its dotted parts is their name.

    'layers.1.*', 'w1' and '*e*' are said of linears. Experts are many: nobody gets them without having said so.
    """
    name = weight.split(".")[-2]
    said = [part for part in pattern.split(".") if len(part.strip("*?")) >= _ENOUGH_LETTERS or part == name]
    return any(fnmatchcase(name, part) for part in said) and reaches_weight(pattern, weight)


_ENOUGH_LETTERS = 4
"""Of a glob that is to name experts, `exper*`."""


def _match_all(
    option: str,
    patterns: Sequence[str],
    linears: Sequence[str],
    *,
    experts: Sequence[str] = (),
    means: Callable[[str, str], bool] = reaches_weight,
) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {fqn for fqn in linears if matches(pattern, fqn)} | {fqn for fqn in experts if means(pattern, fqn)}
        if not hits:
            one = ".".join(experts[0].split(".")[-2:]) if experts else ""
            also = f", and experts have {_names(experts)}, as in {one!r}" if experts else ""
            raise ValueError(_nothing(option, pattern, "linear", linears, also))
        matched |= hits
    return matched


def _nothing(option: str, pattern: str, what: str, linears: Iterable[str], also: str) -> str:
    return (
        f"{option}: {pattern!r} matches no {what} of the model; the {what}s are {_names(linears)}{also}."
        f"{_REGULAR_EXPRESSION * any(c in pattern for c in _ONLY_THERE)}"
    )


_ONLY_THERE = "\\|()^$+"
_REGULAR_EXPRESSION = " Patterns are names, dotted suffixes and globs, not regular expressions."


def matches(pattern: str, fqn: str) -> bool:
    """Whether a pattern of `[lora]` means the linear of this name."""
    if pattern == ALL_LINEAR:
        return not _is_head_or_router(fqn)
    if any(c in pattern for c in "*?["):
        return fnmatchcase(fqn, pattern)
    return fqn == pattern or fqn.endswith("." + pattern)


def _is_head_or_router(fqn: str) -> bool:
    name = fqn.rpartition(".")[2]
    return name in OUTPUT_HEADS or name in _ROUTER_GATES


def _names(linears: Iterable[str]) -> str:
    """Distinct last names in the model's order: `wq, wk, wv, ...`."""
    return ", ".join(dict.fromkeys(fqn.rpartition(".")[2] for fqn in linears)) or "none"
