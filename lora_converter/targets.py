"""From patterns to the exact set of linears, or an error that lists what there is.

A selector that matches nothing is a mistake in a file that somebody will pay GPU hours for, so it is an error.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

ALL_LINEAR = "all-linear"

V = TypeVar("V", int, float)

_OUTPUT_HEADS = {"output", "lm_head"}
_ROUTER_GATES = {"gate", "router"}


def select_targets(linears: Sequence[str], *, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the linears that get an adapter, in the model's order.

    Args:
        linears: Fully qualified names (FQNs) of all linears of the model.
        targets: Patterns to adapt (see `LoRAConfig.target_modules`).
        exclude: Patterns to leave out.

    Raises:
        ValueError: A pattern matches no linear, or nothing is left after `exclude`.
    """
    included = _match_all("lora.target_modules", targets, linears)
    excluded = _match_all("lora.exclude_modules", exclude, linears)
    selected = [fqn for fqn in linears if fqn in included and fqn not in excluded]
    if not selected:
        raise ValueError(
            f"lora.exclude_modules = {list(exclude)} leaves nothing of lora.target_modules = {list(targets)}: "
            f"no linear would be adapted. Exclude fewer of {_names(linears)}."
        )
    return selected


def look_up(option: str, table: Mapping[str, V], fqns: Sequence[str], default: V) -> dict[str, V]:
    """The number that a table of patterns gives to each of the adapted linears `fqns`.

    Args:
        option: `lora.rank_pattern` or `lora.alpha_pattern`, for messages.
        default: Of linears that no pattern matches.

    Raises:
        ValueError: A pattern matches none of them, or two give one of them different numbers.
    """
    found: dict[str, tuple[str, V]] = {}
    for pattern, value in table.items():
        for fqn in _match_all(option, [pattern], fqns, "adapted linear"):
            other, before = found.setdefault(fqn, (pattern, value))
            if before != value:
                raise ValueError(f"{option}: {other!r} gives {fqn} {before}, {pattern!r} gives it {value}. Keep one.")
    return {fqn: found[fqn][1] if fqn in found else default for fqn in fqns}


def _match_all(option: str, patterns: Sequence[str], linears: Sequence[str], what: str = "linear") -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {fqn for fqn in linears if matches(pattern, fqn)}
        if not hits:
            raise ValueError(
                f"{option}: {pattern!r} matches no {what} of the model; the {what}s are {_names(linears)}."
                f"{_REGULAR_EXPRESSION * any(c in pattern for c in _ONLY_THERE)}"
            )
        matched |= hits
    return matched


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
    return name in _OUTPUT_HEADS or name in _ROUTER_GATES


def _names(linears: Sequence[str]) -> str:
    """Distinct last names in the model's order: `wq, wk, wv, ...`."""
    return ", ".join(dict.fromkeys(fqn.rpartition(".")[2] for fqn in linears)) or "none"
