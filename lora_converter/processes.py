"""Whether the process that wrote something is alive, as far as that can be seen from here.

A process number alone says little: each machine, boot and container counts on its own, and numbers are given again. So
a process is told by its number, the place in which that counts, and the time at which the process started.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """What a process writes about itself, for others to ask whether it is gone.

    Attributes:
        place: Boot and process namespace; empty where they are not known.
        started: Ticks of that boot; empty where they are not known.
    """

    number: int
    place: str = ""
    started: str = ""

    @staticmethod
    def here() -> "Process":
        """This process."""
        return Process.of(os.getpid())

    @staticmethod
    def of(number: int) -> "Process":
        """One of this place."""
        return Process(number, _place(), _started(number))

    def is_dead(self) -> bool | None:
        """Whether it is gone, or has ended and is not buried yet; None if that cannot be seen from here."""
        if not self.place or self.place != _place():
            return None
        started = _started(self.number)
        return None if not started and _is_hidden(self.number) else started != self.started


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(number: int) -> str:
    """When a process of this place has started; empty if there is none, or one that has ended."""
    try:
        state, *rest = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _is_hidden(number: int) -> bool:
    """Whether it is a process of another user, on a machine that does not show those."""
    try:
        os.kill(number, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False
