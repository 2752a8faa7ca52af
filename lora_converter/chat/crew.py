"""Work that several processes do together through a folder they all see.

A task makes one folder, the same bytes whoever makes it. A process does every world-th task, then helps with what is
missing, so that none waits for one that is dead. A claim, a small file whose time its owner renews, keeps two from
making the same thing; where it fails (a clock, a cache of a network file system) the work is done twice, and the second
result is thrown away. There is no collective: the data may take longer than any time-out of theirs.
"""

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_converter.files import appears_complete
from lora_converter.processes import Process

logger = logging.getLogger(__name__)

POLL, BEAT, PATIENCE, LOG_EVERY = 0.2, 2.0, 30.0, 10.0
"""Seconds between looks at the folder, between renewals of a claim, until a claim not renewed is void, between logs."""


@dataclass(frozen=True)
class Crew:
    """The processes that work together, and which of them this is."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Task:
    result: Path
    """A folder that is there when the task is done."""
    make: Callable[[Path], None]
    """Fills a folder."""
    size: int = 0
    """Bytes it reads, for the log."""


def share_work(tasks: Sequence[Task], crew: Crew, *, what: str, until: Path | None = None) -> None:
    """Returns when every task's result is there, or `until` is: what is made of the results and replaces them."""
    mine = [task for i, task in enumerate(tasks) if i % crew.world == crew.rank]
    others = [task for i, task in enumerate(tasks) if i % crew.world != crew.rank]
    waiting = mine + others[::-1]  # an owner starts at the other end
    claims = _Claims()
    with _watch(claims, _Progress(what, tasks) if crew.rank == 0 else None):
        while waiting:
            later = []
            for task in waiting:
                if until is not None and until.exists():
                    return
                if not task.result.exists() and not _do(task, claims, until):
                    later.append(task)
            if len(later) == len(waiting):
                time.sleep(POLL)
            waiting = later


def _do(task: Task, claims: "_Claims", until: Path | None) -> bool:
    """Makes a result, unless another process is about it."""
    own = task.result.with_name(f"{task.result.name}.{uuid.uuid4().hex[:12]}")
    try:
        task.result.parent.mkdir(parents=True, exist_ok=True)
        if not claims.take(task.result):
            return False
        if task.result.exists():  # its maker was done between two looks
            return True
        with appears_complete(own) as draft:
            task.make(draft)
        os.rename(own, task.result)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        if not task.result.exists() and not (until is not None and until.exists()):
            raise
    finally:
        claims.release()
    return True


class _Claims:
    def __init__(self) -> None:
        self.held: Path | None = None
        self._me = json.dumps(asdict(Process.here()))
        self._seen: dict[Path, tuple[int, float]] = {}

    def take(self, result: Path) -> bool:
        claim = result.with_name(f"{result.name}.claim")
        if claim.exists():
            if self._alive(claim):
                return False
            claim.unlink(missing_ok=True)
        try:
            with open(claim, "x") as file:
                self.held = claim
                file.write(self._me)
        except FileExistsError:
            return False
        return True

    def renew(self) -> None:
        if (claim := self.held) is not None:
            with suppress(OSError):
                os.utime(claim)

    def release(self) -> None:
        claim, self.held = self.held, None
        if claim is not None:
            claim.unlink(missing_ok=True)

    def _alive(self, claim: Path) -> bool:
        """Times are compared with each other, never with this machine's clock."""
        try:
            renewed, owner = claim.stat().st_mtime_ns, claim.read_text()
        except FileNotFoundError:
            return False
        if _is_dead(owner):
            return False
        last, since = self._seen.get(claim, (None, 0.0))
        if last != renewed:
            self._seen[claim] = renewed, time.monotonic()
            return True
        return time.monotonic() - since < PATIENCE


def _is_dead(owner: str) -> bool:
    """Whether it is seen from here that the process which wrote this into its claim is no more."""
    try:
        return Process(**json.loads(owner)).is_dead() is True
    except (TypeError, ValueError):  # it is still writing
        return False


class _Progress:
    def __init__(self, what: str, tasks: Sequence[Task]) -> None:
        self._what, self._tasks = what, tasks
        self._began = self._logged = time.monotonic()
        self._at_first = self._done()[1]

    def log(self) -> None:
        now = time.monotonic()
        if now - self._logged < LOG_EVERY:
            return
        self._logged = now
        (count, done), total = self._done(), sum(task.size for task in self._tasks)
        rate = (done - self._at_first) / (now - self._began)
        left = f"{(total - done) / rate:,.0f} s left" if rate else "no part is ready yet"
        shown = f"{count:,} of {len(self._tasks):,} parts, {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        logger.info(f"{self._what}: {shown}, {rate / 1e6:,.1f} MB/s, {left}.")

    def _done(self) -> tuple[int, int]:
        """How many tasks are done, and how many bytes those read."""
        there = {folder: set(_names(folder)) for folder in {task.result.parent for task in self._tasks}}
        done = [task.size for task in self._tasks if task.result.name in there[task.result.parent]]
        return len(done), sum(done)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@contextmanager
def _watch(claims: _Claims, progress: _Progress | None) -> Iterator[None]:
    """Renews claims and logs, while the work goes on."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(min(BEAT, LOG_EVERY)):
            claims.renew()
            if progress is not None:
                progress.log()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
