"""Applies the table of changes to the host, once, whoever asks for it; its result undoes them.

    with install():
        ...                  # the host as our jobs need it
                             # the host as it was

Rows that act before the host is imported stay for the life of the process. Nothing here imports the host before
`install` is called.
"""

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from lora_converter.titan import cpu
from lora_converter.titan.change import Change
from lora_converter.titan.cpu_changes import CPU_CHANGES
from lora_converter.titan.host_changes import CHANGES, TRAINER_CHANGES

_MISSING = object()


def change_trainer(trainer: Any, target: str, make: Callable[[Any], Any]) -> None:
    """Replaces an attribute of a trainer that `TRAINER_CHANGES` names.

    Args:
        make: The old value -> the new one.
    """
    assert target in {change.target for change in TRAINER_CHANGES}, target
    *parts, name = target.split(".")
    owner = functools.reduce(getattr, parts, trainer)
    setattr(owner, name, make(getattr(owner, name)))


class Installed:
    """The changes that are in force. A context manager: its end is `undo`."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def apply(self, changes: tuple[Change, ...]) -> None:
        """Makes the changes."""
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
        """Puts back what was there before the first `install`."""
        global _installed
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        if _installed is self:
            _installed = None

    def __enter__(self) -> "Installed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_installed: Installed | None = None


def install() -> Installed:
    """Changes the host as our jobs need it, unless that is done already.

    On a machine without an accelerator CPU ranks are chosen first, unless torchtitan was imported before.
    """
    global _installed
    if _installed is None:
        if "torchtitan.tools.utils" not in sys.modules:
            cpu.prepare()
        installed = Installed()
        installed.apply((*CHANGES, *CPU_CHANGES) if cpu.is_chosen() else CHANGES)
        _installed = installed
    return _installed
