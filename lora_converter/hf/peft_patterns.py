"""PEFT's `rank_pattern` and `alpha_pattern`: expressions of which the first that matches a name's end counts."""

import re
from collections.abc import Iterable, Mapping
from typing import Any


def match_pattern(table: Mapping[str, Any], module: str, default: Any, what: str) -> Any:
    """What one of PEFT's tables gives to a module: the first key that matches the name or a dotted end of it.

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
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as e:
            raise ValueError(f"{what}: {key!r} is no regular expression ({e}).") from None
        if found:
            return value
    return default


def exact_pattern(values: Mapping[str, Any], default: Any, everything: Iterable[str]) -> dict[str, Any]:
    """A table of PEFT's that gives each module its value, and every other one of `everything` the default.

    Keys are whole names, which PEFT takes for expressions that also match at a dotted end: longer names come first, and
    a module that would be matched by the key of another gets one of its own.
    """
    needed = {module: value for module, value in values.items() if value != default}
    caught = [m for m in everything if m not in needed and match_pattern(needed, m, default, "") != default]
    table = needed | {module: values.get(module, default) for module in caught}
    ordered = sorted(table, key=lambda name: (-len(name), name))
    return {name if _matches_itself(name) else re.escape(name): table[name] for name in ordered}


def _matches_itself(name: str) -> bool:
    try:
        return re.fullmatch(name, name) is not None
    except re.error:
        return False
