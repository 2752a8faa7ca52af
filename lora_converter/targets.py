"""From patterns to the exact set of linears, or an error that lists what there is.

A selector that matches nothing is a mistake in a file that somebody will pay GPU hours for, so it is an error.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

ALL_LINEAR = "all-linear"

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


def _match_all(option: str, patterns: Sequence[str], linears: Sequence[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {fqn for fqn in linears if _matches(pattern, fqn)}
        if not hits:
            raise ValueError(
                f"{option}: {pattern!r} matches no linear of the model; the linears are {_names(linears)}."
            )
        matched |= hits
    return matched


def _matches(pattern: str, fqn: str) -> bool:
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
