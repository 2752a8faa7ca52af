"""The checkpoint folder of a run: the step to continue from, and the ones to remove.

    step-N     a step: DCP and lora.json; complete once `.metadata` is there, which is written last and removed first
    step-N     the last one may hold adapters alone (DCP or a PEFT directory): the run is over then

A step that was being saved, or removed, when the job was killed is left where it is and named in the log; the run
writes it again when it gets there.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import OPTIMIZER

from lora_converter.files import remove
from lora_converter.peft import is_peft_directory
from lora_converter.titan.safe_dcp import METADATA_FILE, read_metadata

EXPORTED = ".exported"
"""Added to the name of a PEFT directory where a step is written that was a run's last one and is not any more."""

_STEP = re.compile(r"step-(\d+)")


def newest_step(folder: str, *, last: int, needs_optimizer: bool = True) -> tuple[int, list[str]]:
    """The newest step that a run can continue from.

    Args:
        last: The run's number of steps: at its end adapters alone will do.
        needs_optimizer: A step without optimizer state will not do before.

    Returns:
        Its number, -1 if there is none, and the newer ones with the reasons why they were passed over.

    Raises:
        ValueError: There are complete steps, but all of them hold adapters alone.
    """
    skipped, adapters_only = [], None
    for number, path in _steps(folder):
        if number < last and is_peft_directory(path):
            adapters_only = adapters_only or path
            skipped.append(f"{path} is a PEFT directory, which holds no optimizer state")
            continue
        try:
            stored = None if is_peft_directory(path) else read_metadata(path)
        except ValueError as e:
            skipped.append(str(e).removesuffix("."))
            continue
        if stored is None or number in (0, *range(last, number + 1)) or not needs_optimizer or has_optimizer(stored):
            return number, skipped
        adapters_only = adapters_only or path
        skipped.append(f"{path} holds no optimizer state")
    if adapters_only:
        raise ValueError(no_optimizer(adapters_only))
    return -1, skipped


def has_optimizer(stored: Metadata) -> bool:
    """Whether a step can be trained on from."""
    return any(name.startswith(OPTIMIZER + ".") for name in stored.state_dict_metadata)


def no_optimizer(path: str | Path) -> str:
    """What to do about a step that cannot."""
    return (
        f"{path} holds no optimizer state: it is the last checkpoint of a finished run "
        "(checkpoint.last_save_model_only). To train on from its adapters, name it as lora.initial_adapter_path in a "
        "new job.dump_folder, or resume an earlier step with checkpoint.load_step."
    )


def stale_steps(folder: str, *, keep: int, current: int) -> list[Path]:
    """Steps that are older than the `keep` newest ones, of those up to the one that is being saved, `current`.

    What a killed job left incomplete does not count as one of these, so the last complete step is never removed for
    it. PEFT directories are results, and stay.
    """
    steps = [(number, path) for number, path in _steps(folder) if number <= current and not is_peft_directory(path)]
    kept = [number for number, path in steps if number == current or (path / METADATA_FILE).exists()][:keep]
    return [path for number, path in steps if number < min(kept, default=0)]


def discard(path: Path, *, wholly: bool = True) -> None:
    """Removes a step so that at no moment something incomplete looks complete.

    A PEFT directory is a result and no checkpoint: it is set aside, as `step-N.exported`.

    Args:
        wholly: Otherwise only the step is made incomplete, and somebody else removes the rest.
    """
    if is_peft_directory(path):
        aside = path.with_name(path.name + EXPORTED)
        remove(aside)
        path.rename(aside)
        return
    (path / METADATA_FILE).unlink(missing_ok=True)
    if wholly:
        remove(path)


def _steps(folder: str) -> Iterator[tuple[int, Path]]:
    """Number and path of the steps in a folder, complete or not, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(match[1]), Path(folder, name)) for name in names if (match := _STEP.fullmatch(name))]
    return reversed(sorted(found))
