"""Rows of a data set: row k = 0, 1, 2, ... is row k mod R of epoch k div R, where an epoch has R rows."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_converter.chat.dataset import Dataset
from lora_converter.chat.packing import Plan, plan
from lora_converter.chat.settings import Packing

IGNORED = -100
"""The label of a token that is not trained."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Three arrays, (seq_len,) for a row and (rows, seq_len) for several."""

    input: Ints
    label: Ints
    """The next token of the same example; `IGNORED` where that is not trained, and for padding."""
    documents: Ints
    """1, 2, ...: the example of the row to which a position belongs, and 0 for padding.

    A position attends to positions before it with its own number. So padding attends to padding alone, and has always
    something to attend to: itself.
    """

    @property
    def positions(self) -> Ints:
        """Counted from 0 in each document, padding included."""
        places = np.arange(self.documents.shape[-1])
        begins = np.diff(self.documents, axis=-1, prepend=-1) != 0
        return places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)


class Rows:
    """Rows are made when they are asked for; the plan of one epoch is kept."""

    def __init__(
        self, dataset: Dataset, *, seq_len: int, seed: int = 0, packing: Packing = "documents", pad_id: int = 0
    ) -> None:
        """Args: pad_id: Input of padding; any token of the vocabulary, as nothing is learnt from it."""
        self.dataset, self.seq_len, self.seed, self.packing, self.pad_id = dataset, seq_len, seed, packing, pad_id
        self._epoch, self._plan = 0, self._plan_of(0)
        self.per_epoch = self._plan.rows

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the data set, and what the rows and their order depend on besides."""
        return {**self.dataset.fingerprint, "row_len": self.seq_len, "packing": self.packing, "seed": self.seed}

    @property
    def fill(self) -> float:
        """The fraction of positions that are no padding."""
        return int(self.dataset.lengths.sum(dtype=np.int64)) / (self.per_epoch * self.seq_len)

    def examples(self, k: int) -> list[int]:
        """The examples in row k, by their numbers in the data set."""
        epoch, r = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan.examples[self._plan.row_starts[r] : self._plan.row_starts[r + 1]].tolist()

    def row(self, k: int) -> Batch:
        row, at = self.empty(), 0
        for number, i in enumerate(self.examples(k), 1):
            ids, trained = self.dataset.example(i)
            end = at + len(ids) - 1
            row.input[at:end] = ids[:-1]
            row.label[at:end] = np.where(trained[1:], ids[1:].astype(np.int64), IGNORED)
            row.documents[at:end] = number
            at = end
        return row

    def empty(self) -> Batch:
        """A row of padding."""
        full = (np.full(self.seq_len, value, np.int64) for value in (self.pad_id, IGNORED, 0))
        return Batch(*full)

    def with_seed(self, seed: int) -> "Rows":
        """The same data in another order."""
        if seed == self.seed:
            return self
        return Rows(self.dataset, seq_len=self.seq_len, seed=seed, packing=self.packing, pad_id=self.pad_id)

    def _plan_of(self, epoch: int) -> Plan:
        return plan(self.dataset.lengths, self.seq_len, seed=self.seed, epoch=epoch, packing=self.packing)


def stacked(rows: list[Batch]) -> Batch:
    """Rows as a batch: (rows, seq_len)."""
    return Batch(*(np.stack([getattr(row, name) for row in rows]) for name in ("input", "label", "documents")))


def steps_for(epochs: float, *, rows_per_epoch: int, global_batch: int) -> int:
    """Steps until every row was seen `epochs` times; the last step may begin the next epoch."""
    if not epochs > 0 or math.isinf(epochs):
        raise ValueError(f"chat.epochs is {epochs}; it is more than 0.")
    return math.ceil(Fraction(str(epochs)) * rows_per_epoch / global_batch)
