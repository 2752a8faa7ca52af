"""SIGTERM and SIGUSR1: all ranks finish the step they are in, save it, and end. A second signal ends at once.

Which step that is, the ranks agree on through the process group's store, each by a thread: nothing is exchanged before
a signal comes, and a step costs one comparison. A rank that is told promises not to go beyond the step it is in before
it knows the verdict, and the verdict is the latest step that any rank has promised. So no rank waits for one that
waits for it, however far the host lets some run ahead.
"""

import itertools
import logging
import os
import select
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What torchrun, Slurm and Kubernetes send before they take a machine away."""

SAME_SIGNAL = 0.5
"""Seconds within which signals are one: Slurm sends it to torchrun and to the ranks, and torchrun hands it on."""

ANSWER = 10.0
"""Seconds in which every rank answers, whatever step it is in. One that does not is gone, and nothing can be saved."""

_POLL = 0.5
"""Seconds between two looks at the store."""

_numbers = itertools.count()
_listening: "Preemption | None" = None
"""The signals of a process are one run's at a time: the last one's that listens."""


class Preemption:
    """Listens from `listen` to `close`. Made on all ranks in the same order."""

    def __init__(self) -> None:
        self._key = f"lora-preemption-{next(_numbers)}"
        self._changed = threading.Condition()
        self._done = 0
        self._promised: int | None = None
        self._verdict: int | None = None
        self._signal = 0
        self._heard: float | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as for a process that it has ended: schedulers take that for a requeue."""
        return 128 + self._signal

    def listen(self, step: int) -> None:
        """Takes the signals from now on.

        Args:
            step: The last one that is done.
        """
        global _listening
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread can take signals
        if _listening:
            _listening.close()
        _listening, self._done = self, step
        self._store: Any = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # the process's own is held while something waits for it
        self._inbox, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._old_wake = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="lora-preemption", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the signals back, if they are still this run's."""
        global _listening
        if _listening is not self or threading.current_thread() is not threading.main_thread():
            return
        _listening = None
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wake)
        self._wake.close()
        self._thread.join()
        self._inbox.close()

    def ends_after(self, step: int) -> bool:
        """Whether the run ends after this step, which is done; the same on all ranks."""
        with self._changed:
            self._done = step
            if self._promised is None or step < self._promised:
                return False
            self._changed.wait_for(lambda: self._verdict is not None)
            return self._verdict is not None and step >= self._verdict

    def _watch(self) -> None:
        try:
            if self._until_told():
                self._agree()
                while self._hears(None):
                    pass
        except Exception as e:
            _end(self._signal, f"the ranks cannot agree on a step ({type(e).__name__}: {e})")

    def _until_told(self) -> bool:
        """Waits for a signal, here or on another rank; False for `close`."""
        while not self._signal:
            if not self._hears(_POLL):
                return False
            if not self._signal:
                self._signal = self._told_elsewhere()
            elif self._store:
                self._store.set(f"{self._key}/signal", f"{self._signal}")
        return True

    def _told_elsewhere(self) -> int:
        key = f"{self._key}/signal"
        try:
            return int(self._store.get(key)) if self._store and self._store.check([key]) else 0
        except RuntimeError:  # the rank that keeps the store has ended; a signal of our own would still count
            return 0

    def _hears(self, seconds: float | None) -> bool:
        """Takes in the signals that come within some seconds; False after `close`."""
        if not select.select([self._inbox], [], [], seconds)[0]:
            return True
        data, now = self._inbox.recv(4096), time.monotonic()
        for number in data:
            if number in SIGNALS and self._heard is None:
                self._heard, self._signal = now, self._signal or number
            elif number in SIGNALS and self._heard is not None and now > self._heard + SAME_SIGNAL:
                _end(number, "a second signal")
        return bool(data)

    def _agree(self) -> None:
        with self._changed:
            self._promised = promised = self._done + 1
        logger.warning(
            f"LoRA: {_name(self._signal)}: step {promised} is finished and saved, then the run ends. A second signal "
            "ends it at once."
        )
        verdict = promised if self._store is None else self._latest(promised)
        with self._changed:
            self._verdict = verdict
            self._changed.notify_all()

    def _latest(self, promised: int) -> int:
        ranks, key, end = dist.get_world_size(), self._key, time.monotonic() + ANSWER
        self._store.set(f"{key}/rank-{dist.get_rank()}", f"{promised}")
        if self._store.add(f"{key}/answers", 1) == ranks:
            answers = self._store.multi_get([f"{key}/rank-{rank}" for rank in range(ranks)])
            self._store.set(f"{key}/verdict", f"{max(map(int, answers))}")
        while not self._store.check([f"{key}/verdict"]):
            if time.monotonic() > end:
                _end(self._signal, f"not all ranks have answered within {ANSWER:g} s")
            self._hears(0.01)
        return int(self._store.get(f"{key}/verdict"))


def _end(number: int, reason: str) -> None:
    logger.error(f"LoRA: {_name(number)}: ends at once, without a save: {reason}.")
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _nothing(number: int, frame: FrameType | None) -> None:
    """The number goes to the watching thread."""
