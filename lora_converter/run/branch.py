"""A run that goes back to an older step, and what it leaves behind.

    checkpoint.load_step = 5     begins a branch at step 5: branch.json says so from then on
    its first save               sets newer steps aside first, as set-aside-1/step-10, and nothing is ever deleted
    launched again               with load_step = 5 or without: goes on from the branch's newest step

So nothing is trained on what was left, also when the run is killed between those moments.
"""

import itertools
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_converter.files import read_json, write_whole

logger = logging.getLogger(__name__)

BRANCH = "branch.json"

SET_ASIDE = "set-aside-"

_RESULT = re.compile(r"(?:step|merged)-(\d+)")


@dataclass(frozen=True)
class _Record:
    """What `branch.json` holds.

    Attributes:
        start: The step that was loaded.
        aside: Folder that newer steps are to be moved into; empty once they are.
    """

    start: int
    aside: str = ""


class Branch:
    """The branch of a folder of steps that a run continues."""

    def __init__(self, folder: str | Path):
        self._folder, self.path = Path(folder), Path(folder) / BRANCH
        self._record: _Record | None = None

    def step_to_load(self, load_step: int) -> int:
        """The step that a launch begins at: `load_step` itself, or -1 for the newest one.

        Args:
            load_step: As the job gives it; -1 for none.

        Raises:
            ValueError: `branch.json` is damaged.
        """
        self._record = record = self._read()
        if record is None or load_step not in (-1, record.start):
            return load_step
        if record.aside:
            if load_step == -1:
                logger.info(
                    f"LoRA: {self.path}: the last launch began at step {record.start} (checkpoint.load_step) and "
                    f"saved nothing; so does this one. checkpoint.load_step names another step."
                )
            return record.start
        if load_step != -1:
            logger.info(
                f"LoRA: checkpoint.load_step = {load_step}. An earlier launch went back there, and this one continues "
                f"it. To go back once more, delete {self.path}."
            )
        return -1

    def begin(self, start: int) -> None:
        """Writes down that the run went back to a step. On the first rank, once the step is loaded."""
        if self._record is not None and self._record.start == start:
            return
        newer = self._newer(start)
        aside = next(name for n in itertools.count(1) if not (self._folder / (name := f"{SET_ASIDE}{n}")).exists())
        self._write(_Record(start, aside if newer else ""))
        if newer:
            logger.info(
                f"LoRA: going back to step {start} (checkpoint.load_step). {_names(newer)} will be moved to "
                f"{self._folder / aside} when this run first saves; until then checkpoint.load_step = N goes to any."
            )

    def settle(self) -> None:
        """Sets aside what is newer than the branch's beginning, if that is still to be done. On the first rank.

        Raises:
            OSError: Something cannot be moved; what is left is moved next time.
        """
        record = self._record
        if record is None or not record.aside:
            return
        aside = self._folder / record.aside
        aside.mkdir(exist_ok=True)
        newer = self._newer(record.start)
        for path in newer:
            os.rename(path, aside / path.name)
        self._write(_Record(record.start))
        logger.warning(
            f"LoRA: moved {_names(newer)} to {aside}: they are newer than step {record.start}, which this run went "
            "back to. They can be deleted, or moved back into another job's folder."
        )

    def _newer(self, start: int) -> list[Path]:
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        found = [(int(match[1]), name) for name in names if (match := _RESULT.fullmatch(name))]
        return [self._folder / name for number, name in sorted(found) if number > start]

    def _write(self, record: _Record) -> None:
        self._record = record
        write_whole(self.path, (json.dumps(asdict(record)) + "\n").encode())

    def _read(self) -> _Record | None:
        try:
            record = _Record(**read_json(self.path))
            if type(record.start) is not int or not re.fullmatch(rf"(?:{SET_ASIDE}\d+)?", f"{record.aside}"):
                raise ValueError(f"{asdict(record)}")
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as e:
            raise ValueError(f"{self.path} is damaged ({e}). Delete it to go on from the newest step.") from None
        return record


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
