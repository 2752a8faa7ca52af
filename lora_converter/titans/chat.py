"""What the loaders of conversations share: their state, the same on all ranks and hosts, and what is logged of them."""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from lora_converter.chat import rows
from lora_converter.chat.order import TrainingOrder

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Inputs by name and labels, (rows, seq_len) int64."""


def as_tensors(batch: rows.Batch, **more: rows.Ints) -> Batch:
    """A batch as torchtitan takes it, with more inputs of its size."""
    inputs = dict(input=batch.input, **more)
    return {name: torch.from_numpy(values) for name, values in inputs.items()}, torch.from_numpy(batch.label)


class ChatLoader:
    """Stands before torchtitan's base of data loaders among the bases of a host's, which says how a batch looks.

    Its state is the number of rows that all ranks have consumed, and what they are made of, so that any layout goes on.

    Args:
        added: Id -> text of the tokenizer's added tokens.
    """

    def __init__(self, order: TrainingOrder, added: dict[int, str]):
        self.order, self._added, self._logged = order, added, 0

    def metrics(self) -> dict[str, float]:
        """Of the rows of all ranks since the last call.

        Returns:
            `chat/epoch`: how often the data have been seen; `chat/trained_tokens`: what the loss was over; `chat/fill`:
            the share of positions that are no padding, which torchtitan's tokens per second and MFU count as well.
        """
        order, dataset = self.order, self.order.rows.dataset
        examples = [order.rows.examples(k) for k in range(self._logged, order.consumed)]
        self._logged = order.consumed
        trained, filled = (sum(map(count, examples)) for count in (dataset.count_trained, dataset.count_inputs))
        positions = max(len(examples), 1) * order.rows.seq_len
        return {"chat/epoch": order.epoch, "chat/trained_tokens": trained, "chat/fill": filled / positions}

    def log_beside(self, log: Callable[..., None]) -> Callable[..., None]:
        """A metrics processor's `log`, made one that logs the metrics of this loader, too."""

        @functools.wraps(log)
        def log_with_chat(*values: Any, extra_metrics: dict[str, Any] | None = None, **options: Any) -> None:
            log(*values, extra_metrics={**(extra_metrics or {}), **self.metrics()}, **options)

        return log_with_chat

    def trained_special_tokens(self) -> dict[int, str]:
        """Those of the added tokens that the loss is over, in the first examples, which are like the others in that."""
        dataset, seen = self.order.rows.dataset, set[int]()
        for number in range(min(len(dataset), 1000)):
            ids, trained = dataset.example(number)
            seen.update(ids[trained].tolist())
        return {index: text for index, text in self._added.items() if index in seen}

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks."""
        state = self.order.state_dict()
        return {"rows": state["rows"], "fingerprint": json.dumps(state["fingerprint"], sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `TrainingOrder.load_state_dict`."""
        if not state_dict:
            return
        self.order.load_state_dict({**state_dict, "fingerprint": json.loads(state_dict["fingerprint"])})
        self._logged = self.order.consumed
