"""Changes to a host: rows of tables, applied together and undone together.

    with Installed(CHANGES):
        ...                  # the host as our jobs need it
                             # the host as it was

Nothing here imports a host before a row of its is applied.
"""

import functools
import importlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_MISSING = object()


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
        return getattr(importlib.import_module(f"lora_converter.{module}"), function)(old)


class Installed:
    """Changes that are in force. A context manager: its end is `undo`."""

    def __init__(self, changes: tuple[Change, ...]) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        try:
            for change in changes:
                owner, name = change.owner()
                before = vars(owner).get(name, _MISSING)
                setattr(owner, name, change.new_value(getattr(owner, name)))
                self._undo.append((owner, name, before))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Puts back what was there before."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    @property
    def is_in_force(self) -> bool:
        """Whether the changes are there still."""
        return bool(self._undo)

    def __enter__(self) -> "Installed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
