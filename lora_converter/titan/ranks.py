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
    values = gather_all(value)
    if any(other != value for other in values):
        found = {v: [rank for rank, other in enumerate(values) if other == v] for v in values}
        shown = "; ".join(f"{v} on rank {', '.join(map(str, ranks))}" for v, ranks in found.items())
        raise ValueError(f"{what} differs between ranks: {shown}. Give all machines the same.")
    return value


def gather_all(value: Any) -> list[Any]:
    """The value of every rank; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
