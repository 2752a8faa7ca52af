"""Which rank has which row. The order is global, so that ranks, local batch and accumulation can be chosen freely.

The n-th micro-batch of rank d of D, with L rows each, has the rows (n D + d) L to (n D + d + 1) L. One rank with 4
rows, two with 2, and one with 2 and two accumulation steps see the same 4 rows in a step.
"""

from collections.abc import Iterator
from typing import Any

from lora_converter.chat.crew import Crew
from lora_converter.chat.rows import Batch, Rows, stacked


class TrainingOrder:
    """Batches without end. Its state is one number, the rows that all ranks together have consumed."""

    def __init__(self, rows: Rows, *, local_batch: int, crew: Crew) -> None:
        """Args: crew: The ranks that see different data."""
        self.rows, self._local, self._crew = rows, local_batch, crew
        self.consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.consumed + self._crew.rank * self._local
        batch = stacked([self.rows.row(k) for k in range(first, first + self._local)])
        self.consumed += self._crew.world * self._local
        return batch

    @property
    def epoch(self) -> float:
        """How often the data has been seen."""
        return self.consumed / self.rows.per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks."""
        return {"rows": self.consumed, "fingerprint": self.rows.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last row of a run on any number of ranks.

        Raises:
            ValueError: It is a state of other data, another template or other settings; the message says which.
        """
        if set(state) != {"rows", "fingerprint"} or type(state["rows"]) is not int or state["rows"] < 0:
            raise ValueError(f"The data's state in the checkpoint has {', '.join(map(str, state))}; not of chat data.")
        check_same(state["fingerprint"], self.rows.fingerprint)
        self.consumed = state["rows"]


class ValidationOrder:
    """All rows once, the same ones in the same order at every visit, whatever the run's seed.

    All ranks have equally many batches; where rows run out, rows of padding without labels fill them up.
    """

    def __init__(self, rows: Rows, *, local_batch: int, crew: Crew, parts: int = 1) -> None:
        """Args: parts: Of a local batch, each handed out by itself: its number divides that of the rows."""
        self.rows, self._local, self._crew, self._parts = rows.with_seed(0), local_batch, crew, parts

    def __len__(self) -> int:
        return -(-self.rows.per_epoch // (self._local * self._crew.world)) * self._parts

    def __iter__(self) -> Iterator[Batch]:
        size = self._local // self._parts
        for n in range(len(self)):
            whole, part = divmod(n, self._parts)
            first = (whole * self._crew.world + self._crew.rank) * self._local + part * size
            numbers = range(first, first + size)
            yield stacked([self.rows.row(k) if k < self.rows.per_epoch else self.rows.empty() for k in numbers])


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares fingerprints of rows.

    Raises:
        ValueError: They differ; row numbers of one would be other rows of the other.
    """
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if not names:
        return
    kinds = {"data": "the data files", "template": "the tokenizer, chat.template, template_args, date or train_on"}
    parts = [f"{kinds[name]} (digest {saved.get(name)}, now {now.get(name)})" for name in names if name in kinds]
    parts += [f"{name} ({saved.get(name)}, now {now.get(name)})" for name in names if name not in kinds]
    raise ValueError(
        f"The checkpoint was trained on other rows. What differs: {'; '.join(parts)}. Restore these to go on, or start "
        "a run of its own from the checkpoint's weights."
    )
