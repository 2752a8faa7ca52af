"""Which examples share a row: best-fit decreasing, over lengths instead of examples.

The longest examples are placed first, each in the row with the least room that is enough. Examples of one length do not
differ for that, nor do rows with the same room, so the placing goes by groups: its time depends on how many lengths
there are, a few thousand, and not on how many examples. How many rows there are depends on the lengths alone; which of
the examples of a length goes where, and the order of the rows, on (seed, epoch).

The order is made by arithmetic that is written down here: numpy may change its generators, and a run that goes on under
another version has to find the rows it left.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_converter.chat.settings import Packing, check_choice

_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Plan:
    row_starts: npt.NDArray[np.int64]
    """(rows + 1,): row r has `examples[row_starts[r] : row_starts[r + 1]]`."""
    examples: npt.NDArray[np.int32]
    """(examples,): all of them, once each."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1


def plan(
    lengths: npt.NDArray[np.int32], seq_len: int, *, seed: int = 0, epoch: int = 0, packing: Packing = "documents"
) -> Plan:
    """The rows of one epoch.

    Args:
        lengths: (examples,): inputs of each, 1 to `seq_len`.
        packing: "documents" puts as many examples into a row as fit; "none" puts one.

    Raises:
        ValueError: An example has no room in a row, or `packing` is something else.
    """
    check_choice("packing", packing)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > seq_len:
        span = f"from {lengths.min()} to {lengths.max()}" if len(lengths) else "no examples"
        raise ValueError(f"Rows of {seq_len} tokens hold examples of 1 to {seq_len}; here are {span}.")
    drawn = _draws(len(lengths), seed, epoch, 0)
    if packing == "none":
        return Plan(np.arange(len(lengths) + 1), np.argsort(drawn, kind="stable").astype(np.int32))
    descending = (seq_len - lengths).astype(np.uint64) << np.uint64(40)
    by_length = np.argsort(descending | (drawn >> np.uint64(24)), kind="stable").astype(np.int32)
    row_of, rows = _place(lengths, seq_len)
    place = np.empty(rows, np.int32)
    place[np.argsort(_draws(rows, seed, epoch, 1), kind="stable")] = np.arange(rows, dtype=np.int32)
    row_of = place[row_of]
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=starts[1:])
    return Plan(starts, by_length[np.argsort(row_of, kind="stable")])


def _place(lengths: npt.NDArray[np.int32], seq_len: int) -> tuple[npt.NDArray[np.int32], int]:
    """The row of each example, longest first, and how many rows there are."""
    row_of, at, rooms = np.empty(len(lengths), np.int32), 0, _Rooms()
    rows = 0
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            if (room := rooms.smallest(length)) is None:
                room, wanted = seq_len, -(-left // (seq_len // length))
                rooms.add(room, np.arange(rows, rows + wanted, dtype=np.int32))
                rows += wanted
            each = room // length  # as a row that is begun stays the best until it has no room for another
            taken = rooms.take(room, max(left // each, 1))
            each = min(each, left)
            row_of[at : at + each * len(taken)] = np.repeat(taken, each)
            at, left = at + each * len(taken), left - each * len(taken)
            rooms.add(room - each * length, taken)
    return row_of, rows


class _Rooms:
    """Rows by how much room they have."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._rows: dict[int, list[npt.NDArray[np.int32]]] = {}

    def smallest(self, length: int) -> int | None:
        """The least room that is enough."""
        i = bisect_left(self._sizes, length)
        return self._sizes[i] if i < len(self._sizes) else None

    def add(self, room: int, rows: npt.NDArray[np.int32]) -> None:
        if not room:
            return
        if room not in self._rows:
            insort(self._sizes, room)
            self._rows[room] = []
        self._rows[room].append(rows)

    def take(self, room: int, most: int) -> npt.NDArray[np.int32]:
        """Up to `most` rows with that room."""
        piles = self._rows[room]
        pile = piles.pop()
        if len(pile) > most:
            piles.append(pile[most:])
        if not piles:
            del self._rows[room]
            del self._sizes[bisect_left(self._sizes, room)]
        return pile[:most]


def _draws(n: int, seed: int, epoch: int, stream: int) -> _U64:
    """(n,): numbers that look random, of (seed, epoch, stream) and the place."""
    start = np.zeros(1, np.uint64)
    for value in (seed, epoch, stream):
        start = _mix(start + np.uint64(value % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(start + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
