"""Inside the ranks of a chat job: the rows of each step are written down, and the rank may be killed at a place."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Inside:
    """Called in a rank before its job.

    Attributes:
        record: Folder of one file per rank.
        place: Where the rank is killed: `encode`, at the n-th conversation that it makes tokens of; `enter` and
            `leave`, before and after the n-th step; `save`, when all of its n-th save is written but the last file.
            Nowhere if empty.
    """

    record: Path
    place: str = ""
    number: int = 0

    def __call__(self) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torchtitan.train import Trainer

        from lora_converter.chat import reading
        from lora_converter.chat.masks import ChatTokenizer

        reading.PART_BYTES = 300
        self.record.mkdir(parents=True, exist_ok=True)
        counted = {"encode": ChatTokenizer, "save": FileSystemWriter}
        if self.place in counted:
            owner, name = counted[self.place], {"save": "finish"}.get(self.place, self.place)
            setattr(owner, name, self._killing(getattr(owner, name)))
        Trainer.train_step = self._recording(Trainer.train_step)

    def _killing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[None] = []

        def count_and_call(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count_and_call

    def _recording(self, train_step: Callable[..., None]) -> Callable[..., None]:
        def record(trainer: Any, batches: Iterator[Any]) -> None:
            rows: list[Any] = []

            def recorded() -> Iterator[Any]:
                for inputs, labels in batches:
                    rows.extend(zip(inputs["input"].tolist(), inputs["documents"].tolist(), strict=True))
                    yield inputs, labels

            self._die_at("enter", trainer.step)
            train_step(trainer, recorded())
            mesh = trainer.parallel_dims.get_optional_mesh("batch")
            data_rank = mesh.get_local_rank() if mesh is not None else 0
            with open(self.record / os.environ["RANK"], "a") as file:
                file.write(json.dumps({"step": trainer.step, "data_rank": data_rank, "rows": rows}) + "\n")
            self._die_at("leave", trainer.step)

        return record

    def _die_at(self, place: str, step: int) -> None:
        if (self.place, self.number) == (place, step):
            os.kill(os.getpid(), signal.SIGKILL)
