"""A tokenised cache, opened: examples by number, from memory-mapped files that all processes of a machine share.

Its index takes 4 bytes of each process's memory per example where it has all of the cache in order, and 8 where it is
one side of a split or repeats a file; 8 more per example are pages of `starts`, shared by all.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_converter.chat.parts import COLUMNS, IDS, TRAINED
from lora_converter.figures import percent, short
from lora_converter.files import read_json


@dataclass(frozen=True)
class Counts:
    """What a data set has, and what was left out of the files it is made of."""

    conversations: int
    examples: int
    tokens: int
    trained_tokens: int
    too_long_dropped: int
    truncated: int
    nothing_left_dropped: int

    def describe(self) -> str:
        """For the log. Examples are named where a conversation gives several."""
        kinds = {
            "too long, dropped": self.too_long_dropped,
            "truncated": self.truncated,
            "truncated to nothing that is trained, dropped": self.nothing_left_dropped,
        }
        told = "; ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        conversations = f"{self.conversations:,} conversations{told and f' ({told})'}"
        examples = f"{self.examples:,} examples, " if self.examples != self.conversations else ""
        trained = percent(self.trained_tokens / self.tokens, 0)
        return f"{conversations}, {examples}{short(self.tokens)} tokens, {trained} trained"


@dataclass
class Dataset:
    folder: Path
    fingerprint: dict[str, Any]
    labels: list[str]
    chosen: npt.NDArray[np.int32] | None
    """The examples it has, by their numbers in the cache; None for all of them."""
    counts: Counts
    lengths: npt.NDArray[np.int32] = field(init=False)
    """Inputs of each example: its tokens less one."""

    def __post_init__(self) -> None:
        self._tokens = np.memmap(self.folder / "tokens", "<u4", "r")
        self._starts = np.memmap(self.folder / "starts", "<i8", "r")
        self._trained = _column(self.folder, "trained")
        lengths = _column(self.folder, "lengths")
        self.lengths = lengths if self.chosen is None else lengths[self.chosen]

    def count_trained(self, examples: list[int]) -> int:
        """Labels that are trained, of some examples together."""
        return int(self._trained[examples if self.chosen is None else self.chosen[examples]].sum())

    def count_inputs(self, examples: list[int]) -> int:
        """Positions that some examples take together."""
        return int(self.lengths[examples].sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Token ids, and whether each is trained. IndexError if there is no such example."""
        n = self._number(i)
        stored = np.asarray(self._tokens[self._starts[n] : self._starts[n + 1]])
        return stored & IDS, stored >= TRAINED

    def where(self, i: int) -> str:
        """File and line of an example's record."""
        n = self._number(i)
        ends = np.cumsum([file["examples"] for file in _files(self.folder)])
        file = int(np.searchsorted(ends, n, side="right"))
        return f"{self.labels[file]}:{_column(self.folder, 'lines')[n]}"

    def _number(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"There are {len(self)} examples, and no {i}.")
        return i if self.chosen is None else int(self.chosen[i])


def open_dataset(folder: Path, fingerprint: dict[str, Any], labels: list[str], order: list[int]) -> Dataset:
    """All examples of a cache; those of file `order[0]` first. A file that is in `order` twice is there twice."""
    files = _files(folder)
    ends = np.cumsum([file["examples"] for file in files]).tolist()
    chosen = None
    if order != list(range(len(files))):
        chosen = np.concatenate([np.arange(ends[i] - files[i]["examples"], ends[i], dtype=np.int32) for i in order])
    return Dataset(folder, fingerprint, labels, chosen, _count(folder, chosen, [files[i] for i in order]))


def split_dataset(whole: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """See `Cache.split`."""
    if not 0 < fraction < 1:
        raise ValueError(f"chat.validation_split is {fraction}; a fraction of the data is between 0 and 1.")
    keys = _column(whole.folder, "keys")
    in_validation = (keys if whole.chosen is None else keys[whole.chosen]) < int(fraction * 2**32)
    sides = []
    for side in (~in_validation, in_validation):
        places = np.flatnonzero(side).astype(np.int32)
        if not len(places):
            missing = "training" if side is not in_validation else "validation"
            raise ValueError(
                f"chat.validation_split {fraction} of {whole.counts.conversations:,} conversations leaves none for "
                f"{missing}. Give another fraction, or a validation file."
            )
        chosen = places if whole.chosen is None else whole.chosen[places]
        name = {"validation_split": fraction, "side": "validation" if side is in_validation else "training"}
        counts = _count(whole.folder, chosen, [_dropped(whole.counts)])
        sides.append(Dataset(whole.folder, {**whole.fingerprint, **name}, whole.labels, chosen, counts))
    return sides[0], sides[1]


def _dropped(counts: Counts) -> dict[str, int]:
    """What was left out, of which a side says the same as the whole."""
    return {
        "too_long": counts.too_long_dropped,
        "truncated": counts.truncated,
        "nothing_left": counts.nothing_left_dropped,
    }


def _count(folder: Path, chosen: npt.NDArray[np.int32] | None, files: list[dict[str, int]]) -> Counts:
    lines = _column(folder, "lines")
    first = np.ones(len(lines), bool)  # of a conversation
    np.not_equal(lines[1:], lines[:-1], out=first[1:])
    ends = np.cumsum([file["examples"] for file in _files(folder)])
    first[ends[ends < len(first)]] = True
    of_all = (first, _column(folder, "lengths"), _column(folder, "trained"))
    first, lengths, trained = of_all if chosen is None else (column[chosen] for column in of_all)
    return Counts(
        conversations=int(first.sum()),
        examples=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)) + len(lengths),
        trained_tokens=int(trained.sum(dtype=np.int64)),
        too_long_dropped=sum(file["too_long"] for file in files),
        truncated=sum(file["truncated"] for file in files),
        nothing_left_dropped=sum(file["nothing_left"] for file in files),
    )


def _column(folder: Path, name: str) -> npt.NDArray[Any]:
    return np.memmap(folder / name, COLUMNS[name], "r")


def _files(folder: Path) -> list[dict[str, int]]:
    return read_json(folder / "summary.json")["files"]
