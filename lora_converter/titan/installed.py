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
from typing import Any

from lora_converter.titan.cpu_changes import CPU_CHANGES
from lora_converter.titan.host_changes import CHANGES, TRAINER_CHANGES
from lora_converter.titans import cpu
from lora_converter.titans.change import Installed


def change_trainer(trainer: Any, target: str, make: Callable[[Any], Any]) -> None:
    """Replaces an attribute of a trainer that `TRAINER_CHANGES` names.

    Args:
        make: The old value -> the new one.
    """
    assert target in {change.target for change in TRAINER_CHANGES}, target
    *parts, name = target.split(".")
    owner = functools.reduce(getattr, parts, trainer)
    setattr(owner, name, make(getattr(owner, name)))


_installed: Installed | None = None


def install() -> Installed:
    """Changes the host as our jobs need it, unless that is done already.

    On a machine without an accelerator CPU ranks are chosen first, unless torchtitan was imported before.
    """
    global _installed
    if _installed is None or not _installed.is_in_force:
        if "torchtitan.tools.utils" not in sys.modules:
            cpu.prepare()
        _installed = Installed((*CHANGES, *CPU_CHANGES) if cpu.is_chosen() else CHANGES)
    return _installed
