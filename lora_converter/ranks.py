"""What one rank finds wrong, all ranks raise: a mistake on one machine ends the job at once, not by a time-out."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(check: Callable[[], T]) -> T:
    """Runs `check` on every rank and returns its result, if it passes on all.

    Raises:
        ValueError: It raised ValueError or OSError, a user's mistake, on some rank; the message says what and where.
        RuntimeError: It raised something else, a mistake of the code's, on another rank. That rank raises its own.
    """
    error: Exception | None = None
    try:
        result = check()
    except Exception as e:
        error = e
    is_mistake = isinstance(error, ValueError | OSError)
    told = None if error is None else (is_mistake, str(error) if is_mistake and str(error) else repr(error))
    found = gather_all(told)
    if error is not None and not is_mistake:
        raise error
    failed = [(rank, *entry) for rank, entry in enumerate(found) if entry]
    if failed:
        ranks = ", ".join(str(rank) for rank, *_ in failed)
        where = "" if len(failed) == len(found) else f"Rank {ranks} of {len(found)}: "
        all_mistakes = all(mistake for _, mistake, _ in failed)
        raise (ValueError if all_mistakes else RuntimeError)(f"{where}{failed[0][2]}") from error
    return result


def on_first_rank(write: Callable[[], None]) -> None:
    """Does what is done once; the others wait for it, and raise what it raises (see `together`)."""
    together(lambda: write() if is_first_rank() else None)


def from_first_rank(find: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks, which raise what it raises (see `together`)."""
    found: Any = [together(lambda: find() if is_first_rank() else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


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


def gather_all(value: T) -> list[T]:
    """The value of every rank; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: T) -> list[T]:
    """The value of every rank, on rank 0; nothing on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values if is_first_rank() else None)
    return values if is_first_rank() else []


def union_over_ranks(names: list[str]) -> list[str]:
    """Names found on any rank: pipeline stages see different ones, and all ranks must raise or none."""
    return list(dict.fromkeys(name for part in gather_all(names) for name in part))


def merged_over_ranks(mine: Mapping[str, T]) -> dict[str, T]:
    """What all ranks know by name, in one table: pipeline stages know different modules. A collective."""
    return {name: value for found in gather_all(mine) for name, value in found.items()}


def is_first_rank() -> bool:
    """Whether this rank writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0
