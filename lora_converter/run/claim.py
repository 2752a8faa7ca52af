"""One writer of a folder of steps: who holds it says so beside it, and nobody joins in.

    checkpoint.writer.json      beside the folder `checkpoint`: host, process, since when, and a number that its
                                holder counts up while it lives

A holder on this machine is alive if its process is. One elsewhere is alive if the number moves while a newcomer
watches: clocks of machines and file systems are not compared, and no locks are asked for, which network file systems
and mounts of object stores may not have. A dead holder's claim is taken over. Who has lost his to another, after a
long sleep for instance, does not write any more.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from lora_converter.files import read_json
from lora_converter.processes import Process
from lora_converter.ranks import gather_all, is_first_rank, on_first_rank, together

logger = logging.getLogger(__name__)

WRITER = ".writer.json"
"""Added to the name of a folder: the claim on it."""

BEAT = 15.0
"""Seconds between two counts of a holder."""

PATIENCE = 4 * BEAT
"""Seconds without a count after which a holder elsewhere is dead."""

_EXCHANGE = 0.5
"""Seconds after which of several that took over a dead one's claim the last has written."""

_VISIBLE_AFTER = 5.0
"""Seconds until a file of a new name is seen by all machines that share a folder."""


@dataclass(frozen=True)
class Holder:
    """Who writes to a folder.

    Attributes:
        process: Its number where it runs.
        since: UTC, ISO 8601.
        place: Where that number counts.
        started: When the process started, see `processes.py`.
        token: Of this claim alone.
        count: Moves while the holder lives.
    """

    host: str
    process: int
    since: str
    place: str = ""
    started: str = ""
    token: str = ""
    count: int = 0

    @staticmethod
    def here() -> "Holder":
        """This process, from now on."""
        since, me = datetime.now(timezone.utc).isoformat(timespec="seconds"), Process.here()
        return Holder(socket.gethostname(), me.number, since, me.place, me.started, uuid.uuid4().hex)

    def __str__(self) -> str:
        ours = " (this one: close its trainer)" if self.writer == Process.here() else ""
        return f"process {self.process} on {self.host}{ours}, since {self.since}"

    @property
    def writer(self) -> Process:
        return Process(self.process, self.place, self.started)


class Claim:
    """A folder that one run writes to, from `hold` to `release`. Of the first rank alone."""

    def __init__(self, folder: str | Path):
        self._folder, self.path = Path(folder), beside(folder, WRITER)
        self._mine: Holder | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Takes the folder, or makes sure that it is still ours.

        Raises:
            ValueError: Somebody else holds it.
        """
        if self._mine:
            holder = _read(self.path)
            if holder is None or holder.token != self._mine.token:
                lost = f"by {holder}" if holder else f"when {self.path} was removed"
                raise ValueError(f"{self._folder} was taken over {lost}. This run writes to it no more: end it.")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = Holder.here()
        if not self._take(mine):
            holder = _read(self.path)
            left = holder is None or self._has_left(holder)
            if not (left and self._take(mine)):
                if left and (quicker := _read(self.path)):
                    raise self._held(quicker)
                self._write(mine)
            time.sleep(_EXCHANGE)  # several may have seen the dead one: the last to write has it
            if (found := _read(self.path)) is None or found.token != mine.token:
                raise self._held(found or mine)
        self._mine, self._released = mine, threading.Event()
        self._thread = threading.Thread(target=self._count, args=(mine, self._released), name="lora-claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leaves the folder to the next one; without effect if it is not held any more."""
        self._released.set()
        if self._thread:
            self._thread.join()  # which may be about to write the file
        mine, self._mine = self._mine, None
        try:
            if mine and (found := _read(self.path)) and found.token == mine.token:
                self.path.unlink(missing_ok=True)
            if mine and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()  # a run that was refused leaves nothing
        except (OSError, ValueError) as e:
            logger.warning(f"LoRA: {self.path} cannot be removed ({e}); the next run takes it over.")

    def _take(self, mine: Holder) -> bool:
        """Takes a folder that nobody holds; False if somebody does, or if the file system cannot say so at once."""
        draft = self._draft(mine)
        try:
            os.link(draft, self.path)
        except OSError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _has_left(self, holder: Holder) -> bool:
        """Whether a holder has released the folder; False if it is dead.

        Raises:
            ValueError: It lives.
        """
        folder = self._folder
        dead = holder.writer.is_dead()
        if dead is None:
            logger.info(f"LoRA: {folder} is held by {holder}; watching for {PATIENCE:g} s whether it lives.")
            end = time.monotonic() + PATIENCE
            while not dead:
                time.sleep(PATIENCE / 100)
                found = _read(self.path)
                if found is not None and found != holder:
                    raise self._held(found)
                if found is None:
                    return True
                dead = time.monotonic() > end
        if not dead:
            raise self._held(holder)
        self._draft_path(holder).unlink(missing_ok=True)
        logger.warning(f"LoRA: {folder} was held by {holder}, which is gone; this run takes it over.")
        return False

    def _count(self, mine: Holder, released: threading.Event) -> None:
        count = 0
        while not released.wait(BEAT):
            count += 1
            try:
                found = _read(self.path)
                if found is None or found.token != mine.token:
                    return  # `hold` tells at the next save
                self._write(replace(mine, count=count))
            except (OSError, ValueError) as e:
                logger.warning(f"LoRA: {self.path} cannot be written ({e}).")

    def _write(self, holder: Holder) -> None:
        os.replace(self._draft(holder), self.path)

    def _draft(self, holder: Holder) -> Path:
        draft = self._draft_path(holder)
        draft.write_text(json.dumps(asdict(holder), indent=2) + "\n")
        return draft

    def _draft_path(self, holder: Holder) -> Path:
        return self.path.with_name(f"{self.path.name}.{holder.token}")

    def _held(self, holder: Holder) -> ValueError:
        return ValueError(
            f"{self._folder} is written to by another run: {holder}. End that one first, or name another "
            f"job.dump_folder. If it is not running any more, delete {self.path}."
        )


def beside(folder: str | Path, ending: str) -> Path:
    """A file that belongs to a folder and is not in it: what lists the folder's steps does not meet it."""
    path = Path(folder).absolute()
    return path.with_name(path.name + ending)


def check_shared(folder: str | Path) -> None:
    """That all ranks see one folder under its name, by a file of a new name that the first one writes. A collective.

    Raises:
        ValueError: On all ranks: some rank sees another folder.
    """
    tokens = gather_all(uuid.uuid4().hex)
    if len(tokens) == 1:
        return
    path = beside(folder, f".shared-{tokens[0]}")

    def look() -> None:
        end = time.monotonic() + _VISIBLE_AFTER
        while not path.exists():
            if time.monotonic() > end:
                raise ValueError(
                    f"{Path(folder).absolute()} is not the folder that rank 0 writes to. A step of which each machine "
                    "has a part cannot be resumed: put job.dump_folder on storage that all machines share."
                )
            time.sleep(0.1)

    on_first_rank(path.touch)
    try:
        together(look)
    finally:
        if is_first_rank():
            path.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**read_json(path))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}). Delete it if no run writes to its folder.") from None
