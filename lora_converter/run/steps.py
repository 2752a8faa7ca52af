"""The checkpoint folder of a run: the step to continue from, and the ones to remove.

    step-N     a step: DCP and lora.json; complete once `.metadata` is there, which is written last and removed first
    step-N     the last one may hold adapters alone (DCP or a PEFT directory): the run is over then

A step that was being saved, or removed, when the job was killed is left where it is and named in the log; the run
writes it again when it gets there.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from lora_converter.adapted import AdaptedModule, modules_of
from lora_converter.dcp.reader import METADATA_FILE, read_folder, read_metadata
from lora_converter.files import remove
from lora_converter.hf.peft_directory import is_peft_directory
from lora_converter.run.description import MODEL, PARTS, TRAIN_STATE, Description

EXPORTED = ".exported"
"""Added to the name of a PEFT directory where a step is written that was a run's last one and is not any more."""

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Step:
    """A step folder that has been looked through: what it holds and says is read once.

    Attributes:
        stored: What its DCP files hold; None for a PEFT directory.
        digest: Of `.metadata`.
        description: Its `lora.json`; None if it has none.
    """

    number: int
    path: Path
    stored: Metadata | None = None
    digest: str = ""
    description: Description | None = None

    @property
    def is_peft(self) -> bool:
        """Whether it is a PEFT directory, which holds adapters alone."""
        return self.stored is None

    @property
    def has_state(self) -> bool:
        """Whether it holds more than adapters, so that it can be trained on from."""
        return self.stored is not None and _has_state(self.stored)

    @property
    def no_state(self) -> str:
        """What to say of one that does not."""
        return (
            f"{self.path} holds no optimizer state: it is the end of a finished run (checkpoint.last_save_model_only)"
        )


def read_step(number: int, path: Path) -> Step:
    """Looks through a step folder.

    Raises:
        ValueError: It is not complete, or damaged.
    """
    if is_peft_directory(path):
        return Step(number, path)
    description = Description.read(path)
    stored, digest = read_folder(path)
    return Step(number, path, stored, digest, description)


def newest_step(folder: str, *, last: int, needs_state: bool = True) -> tuple[Step | None, list[str]]:
    """The newest step that a run can continue from.

    Args:
        last: The run's number of steps: at its end adapters alone will do.
        needs_state: A step of adapters alone, without optimizer and train state, will not do before.

    Returns:
        The step, None if there is none, and the newer ones with the reasons why they were passed over.

    Raises:
        ValueError: There is none, but steps that were whole once: they are not trained over without a word.
    """
    skipped, once_whole = [], False
    for number, path in _steps(folder):
        try:
            step = read_step(number, path)
        except (ValueError, OSError) as e:
            skipped.append(str(e).removesuffix("."))
            once_whole = once_whole or (path / METADATA_FILE).exists()
            continue
        if number == 0 and step.is_peft:  # an exported seed checkpoint
            continue
        if number == 0 or number >= last or step.has_state or not (needs_state or step.is_peft):
            return step, skipped
        skipped.append(step.no_state)
        once_whole = True
    if once_whole:
        raise ValueError(
            f"{folder} has steps, and none to continue from: {'; '.join(skipped)}. Put back what is missing, or name "
            "another job.dump_folder; to train on from adapters alone, name them as lora.initial_adapter_path there."
        )
    return None, skipped


def _has_state(stored: Metadata) -> bool:
    return any(name.startswith(f"{TRAIN_STATE}.") for name in stored.state_dict_metadata)


def stale_steps(folder: str, *, keep: int, current: int) -> list[Path]:
    """Steps that are older than the `keep` newest ones, of those up to the one that is being saved, `current`.

    Only what can be continued from counts as kept, so the last such step is never removed for what a killed job, a
    damaged disk or a finished run has left. PEFT directories are results, and stay.
    """
    steps = [(number, path) for number, path in _steps(folder) if number <= current and not is_peft_directory(path)]
    kept = [number for number, path in steps if number == current or _continues(path)][:keep]
    return [path for number, path in steps if number < min(kept, default=0)]


def _continues(path: Path) -> bool:
    try:
        return _continues_as_written(path, (path / METADATA_FILE).stat().st_mtime_ns)
    except OSError:
        return False


@functools.lru_cache(maxsize=1024)
def _continues_as_written(path: Path, when: int) -> bool:
    """Reading it takes as long as a small save, so each step is read once."""
    try:
        return _has_state(read_metadata(path))
    except ValueError:
        return False


def discard(path: Path, *, wholly: bool = True) -> None:
    """Removes a step so that at no moment something incomplete looks complete; of a link, the link.

    A PEFT directory is a result and no checkpoint: it is set aside, as `step-N.exported`.

    Args:
        wholly: Otherwise only the step is made incomplete, and somebody else removes the rest.
    """
    if path.is_symlink():
        path.unlink()
    elif is_peft_directory(path):
        names = (path.with_name(path.name + EXPORTED + (f"-{n}" if n else "")) for n in itertools.count())
        path.rename(next(name for name in names if not name.exists()))
    else:
        (path / METADATA_FILE).unlink(missing_ok=True)
        if wholly:
            remove(path)


def _steps(folder: str) -> Iterator[tuple[int, Path]]:
    """Number and path of the steps in a folder, complete or not, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(match[1]), Path(folder, name)) for name in names if (match := _STEP.fullmatch(name))]
    return reversed(sorted(found))


def adapters_in(
    stored: Metadata, kinds: Iterable[type[AdaptedModule]], base: Iterable[str], *, ours: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """The adapted modules of a step, and what else it holds of a model that is not the base's.

    Args:
        kinds: Kinds of adapted modules whose parameters are known.
        base: Names of the base's own entries.
        ours: Adapter parameters of the job. What more a step has of their modules is none of the job's.
    """
    states = tuple(f"{part}." for part in PARTS if part != MODEL)
    names = [name for name in stored.state_dict_metadata if not name.startswith(states)]
    kinds = list(kinds)
    modules = modules_of(names, kinds)
    ours = set(ours)
    others = set(modules) - set(modules_of(ours, kinds))
    known = {f"{module}.{name}" for module in others for kind in kinds for name in kind.adapter_parameter_names}
    return modules, sorted(set(names) - known - ours - set(base))
