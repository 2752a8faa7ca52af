"""One writer of a folder of steps: who holds it says so in it, and nobody joins in.

    writer.json     host, process, since when, and a number that its holder counts up while it lives

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
from datetime import UTC, datetime
from pathlib import Path

from lora_converter.files import read_json
from lora_converter.ranks import gather_all, is_first_rank, on_first_rank, together

logger = logging.getLogger(__name__)

WRITER = "writer.json"

BEAT = 15.0
"""Seconds between two counts of a holder."""

PATIENCE = 4 * BEAT
"""Seconds without a count after which a holder elsewhere is dead."""

_EXCHANGE = 0.5
"""Seconds after which of several that took over a dead one's claim the last has written."""

_VISIBLE_AFTER = 30.0
"""Seconds until a new file is seen by all machines that share a folder; network file systems cache names."""


@dataclass(frozen=True)
class Holder:
    """Who writes to a folder.

    Attributes:
        process: Its number where it runs.
        since: UTC, ISO 8601.
        place: Boot and process namespace, which give process numbers their meaning; empty where they are not known.
        started: When the process started, in ticks of that boot.
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
        since = datetime.now(UTC).isoformat(timespec="seconds")
        process = os.getpid()
        return Holder(socket.gethostname(), process, since, _place(), _started(process), uuid.uuid4().hex)

    def __str__(self) -> str:
        ours = " (this one: close its trainer)" if self.process == os.getpid() and self.place == _place() else ""
        return f"process {self.process} on {self.host}{ours}, since {self.since}"

    def is_dead(self) -> bool | None:
        """Whether its process is gone; None if that cannot be seen from here."""
        if not self.place or self.place != _place():
            return None
        return _started(self.process) != self.started


class Claim:
    """A folder that one run writes to, from `hold` to `release`. Of the first rank alone."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / WRITER
        self._mine: Holder | None = None
        self._released = threading.Event()

    @property
    def token(self) -> str:
        """By which others see that they see the same folder; empty if it is not held."""
        return self._mine.token if self._mine else ""

    def hold(self) -> None:
        """Takes the folder, or makes sure that it is still ours.

        Raises:
            ValueError: Somebody else holds it.
        """
        if self._mine:
            holder = _read(self.path)
            if holder is None or holder.token != self._mine.token:
                lost = f"by {holder}" if holder else f"when {self.path} was removed"
                raise ValueError(f"{self.path.parent} was taken over {lost}. This run writes to it no more: end it.")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = Holder.here()
        if not self._take(mine):
            if holder := _read(self.path):
                self._wait_for_end_of(holder)
            self._write(mine)
            time.sleep(_EXCHANGE)  # several may have seen the dead one: the last to write has it
            if (found := _read(self.path)) is None or found.token != mine.token:
                raise self._held(found or mine)
        self._mine, self._released = mine, threading.Event()
        threading.Thread(target=self._count, args=(mine, self._released), name="lora-claim", daemon=True).start()

    def release(self) -> None:
        """Leaves the folder to the next one; without effect if it is not held any more."""
        self._released.set()
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

    def _wait_for_end_of(self, holder: Holder) -> None:
        folder = self.path.parent
        dead = holder.is_dead()
        if dead is None:
            logger.info(f"LoRA: {folder} is held by {holder}; watching for {PATIENCE:g} s whether it lives.")
            end = time.monotonic() + PATIENCE
            while not dead:
                time.sleep(PATIENCE / 100)
                found = _read(self.path)
                if found is not None and found != holder:
                    raise self._held(found)
                dead = found is None or time.monotonic() > end
        if not dead:
            raise self._held(holder)
        for draft in folder.glob(f"{WRITER}.*"):
            draft.unlink(missing_ok=True)
        logger.warning(f"LoRA: {folder} was held by {holder}, which is gone; this run takes it over.")

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
        draft = self.path.with_name(f"{WRITER}.{holder.token}")
        draft.write_text(json.dumps(asdict(holder), indent=2) + "\n")
        return draft

    def _held(self, holder: Holder) -> ValueError:
        return ValueError(
            f"{self.path.parent} is written to by another run: {holder}. End that one first, or name another "
            f"job.dump_folder. If it is not running any more, delete {self.path}."
        )


def claim_together(folder: str | Path) -> Claim:
    """Claims a folder for the run of all ranks, of which the first one writes the claim. A collective.

    Raises:
        ValueError: On all ranks: somebody else holds it, or some rank sees another folder under this name.
    """
    claim = Claim(folder)
    try:
        on_first_rank(claim.hold)
        token = gather_all(claim.token)[0]
        together(lambda: _check_shared(claim.path, token))
    except ValueError:
        claim.release()
        raise
    return claim


def _check_shared(path: Path, token: str) -> None:
    end = time.monotonic() + _VISIBLE_AFTER
    while not is_first_rank() and ((holder := _read(path)) is None or holder.token != token):
        if time.monotonic() > end:
            found = f"{path} is of {holder}" if holder else f"there is no {path}"
            raise ValueError(
                f"{path.parent.absolute()} is not the folder that rank 0 writes to: here {found}. A step of which "
                "each machine has a part cannot be resumed: put job.dump_folder on storage that all machines share."
            )
        time.sleep(0.1)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**read_json(path))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}). Delete it if no run writes to its folder.") from None


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process of this place has started; empty if it is not there, or has ended and is not buried yet."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
