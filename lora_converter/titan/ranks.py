"""What one rank finds wrong, all ranks raise: a mistake on one machine ends the job at once, not by a time-out."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(check: Callable[[], T]) -> T:
    """Runs `check` on every rank and returns its result, if it passes on all.

    Raises:
        ValueError: It raised on some rank; the message says what and where.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as e:
        error = e
    errors = gather_all(None if error is None else str(error) or repr(error))
    failed = [rank for rank, message in enumerate(errors) if message]
    if failed:
        where = "" if len(failed) == len(errors) else f"Rank {', '.join(map(str, failed))} of {len(errors)}: "
        raise ValueError(f"{where}{errors[failed[0]]}") from error
    return result  # type: ignore[return-value]


def agreed(value: T, what: str) -> T:
    """Returns `value` if it is the same on all ranks.

    Raises:
        ValueError: It is not; the message has each value with its ranks.
    """
    agreed_options({what: value})
    return value


def agreed_options(options: dict[str, Any]) -> None:
    """Compares settings, name -> value, over all ranks.

    Raises:
        ValueError: Some are not the same on all ranks; the message has each one's values with their ranks.
    """
    gathered = gather_all(options)
    differ = []
    for name in dict.fromkeys(name for found in gathered for name in found):
        values = [repr(found[name]) if name in found else "nothing" for found in gathered]
        if len(set(values)) > 1:
            ranks = {value: [str(rank) for rank, other in enumerate(values) if other == value] for value in values}
            shown = "; ".join(f"{value} on rank {', '.join(on)}" for value, on in ranks.items())
            differ.append(f"{name} differs between ranks: {shown}.")
    if differ:
        raise ValueError(f"{' '.join(differ)} Give all machines the same.")


def gather_all(value: Any) -> list[Any]:
    """The value of every rank; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
