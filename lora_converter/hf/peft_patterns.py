"""PEFT's `rank_pattern` and `alpha_pattern`: expressions of which the first that matches a name's end counts."""

import re
from collections.abc import Iterable, Mapping
from typing import Any


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


def exact_pattern(
    values: Mapping[str, Any], default: Any, everything: Iterable[str], *, as_parameters: Iterable[str] = ()
) -> dict[str, Any]:
    """A table of PEFT's that gives each module its value, and every other one of `everything` the default.

    Keys are whole names. PEFT takes them for expressions that also match at a dotted end: a name that is the end of
    another module's gets an expression that matches nothing else, so that the order, which PEFT changes when it saves,
    does not matter. Modules that PEFT adapts as parameters, named in `as_parameters` by their weights, go by either
    name: other loaders know them as modules.
    """
    everything = list(everything)
    parameters = {name.removesuffix(".weight") for name in as_parameters}
    table = {}
    for module in sorted(module for module, value in values.items() if value != default):
        key = module if _means_one(module, everything) else rf"(?<!\.){re.escape(module)}"
        table[key + r"(\.weight)?" * (module in parameters)] = values[module]
    return table


def _means_one(name: str, everything: Iterable[str]) -> bool:
    """Whether a name, as PEFT's expression, matches itself and none of the others."""
    try:
        expression = re.compile(rf"(.*\.)?({name})$")
    except re.error:
        return False
    return bool(expression.match(name)) and not any(expression.match(m) for m in everything if m != name)
