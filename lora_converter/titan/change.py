"""A change to the host: one row of the tables in `host_changes.py` and `cpu_changes.py`."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One attribute of the host's.

    Attributes:
        target: `module:path.to.attribute`; of a trainer, the path alone.
        make: `module:function` below this package: the old value -> the new one.
        reason: Why the host's own will not do.
        until: When the row can go.
    """

    target: str
    make: str
    reason: str
    until: str

    def owner(self) -> tuple[Any, str]:
        """The object that has the attribute, and the attribute's name."""
        module, _, path = self.target.partition(":")
        *parts, name = path.split(".")
        return functools.reduce(getattr, parts, importlib.import_module(module)), name

    def new_value(self, old: Any) -> Any:
        """What takes the place of `old`."""
        module, _, function = self.make.partition(":")
        return getattr(importlib.import_module(f"lora_converter.titan.{module}"), function)(old)
