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
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import TRAIN_STATE

from lora_converter.files import remove
from lora_converter.peft import is_peft_directory
from lora_converter.titan.safe_dcp import METADATA_FILE, read_metadata
from lora_converter.titan.step_folder import Description

EXPORTED = ".exported"
"""Added to the name of a PEFT directory where a step is written that was a run's last one and is not any more."""

_STEP = re.compile(r"step-(\d+)")


def newest_step(folder: str, *, last: int, needs_state: bool = True) -> tuple[int, list[str]]:
    """The newest step that a run can continue from.

    Args:
        last: The run's number of steps: at its end adapters alone will do.
        needs_state: A step of adapters alone, without optimizer and train state, will not do before.

    Returns:
        Its number, -1 if there is none, and the newer ones with the reasons why they were passed over.

    Raises:
        ValueError: There is none, but steps that were whole once: they are not trained over without a word.
    """
    skipped, once_whole = [], False
    for number, path in _steps(folder):
        is_peft = is_peft_directory(path)
        if number == 0 and is_peft:  # an exported seed checkpoint
            continue
        try:
            usable = number == 0 or number >= last
            if not is_peft:
                Description.read(path)
                stored = read_metadata(path)
                usable = usable or not needs_state or has_state(stored)
        except (ValueError, OSError) as e:
            skipped.append(str(e).removesuffix("."))
            once_whole = once_whole or (path / METADATA_FILE).exists()
            continue
        if usable:
            return number, skipped
        skipped.append(no_state(path))
        once_whole = True
    if once_whole:
        raise ValueError(
            f"{folder} has steps, and none to continue from: {'; '.join(skipped)}. Put back what is missing, or name "
            "another job.dump_folder; to train on from adapters alone, name them as lora.initial_adapter_path there."
        )
    return -1, skipped


def has_state(stored: Metadata) -> bool:
    """Whether a step holds more than adapters, so that it can be trained on from."""
    return any(name.startswith(f"{TRAIN_STATE}.") for name in stored.state_dict_metadata)


def no_state(path: str | Path) -> str:
    """What to say of a step that does not."""
    return f"{path} holds no optimizer state: it is the end of a finished run (checkpoint.last_save_model_only)"


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
        return has_state(read_metadata(path))
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
