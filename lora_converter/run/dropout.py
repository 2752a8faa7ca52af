"""Dropout masks that a resumed run draws again.

Hosts do not store the state of random generators, and what a process draws before its first step is not what an
uninterrupted one had drawn. So the generator is seeded anew before each step, from the job's seed and the step. Ranks
that see other rows or other positions (data and context parallelism) draw other masks; tensor-parallel ranks, which see
the same rows, draw the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from lora_converter.names import stable_hash


class DropoutSeeds:
    """Seeds the generator before the first forward of each step.

    Args:
        model_parts: The models whose forward begins a step; several with pipeline stages.
        data_rank: See `Host.data_rank`. The process's generator is seeded by the job by then.
    """

    def __init__(self, model_parts: Sequence[nn.Module], data_rank: int):
        self._stream = f"{torch.initial_seed()}:{data_rank}"  # torchtitan gives pipeline ranks different seeds
        self._steps_done: int | None = 0
        for part in model_parts:
            part.register_forward_pre_hook(self._seed)

    def continue_after(self, step: int) -> None:
        """The next training forward belongs to step + 1."""
        self._steps_done = step

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is drawn in here belongs to no step: the next forward is seeded as it would have been."""
        steps_done = self._steps_done
        yield
        self._steps_done = steps_done

    def _seed(self, model: nn.Module, args: Any) -> None:
        if model.training and self._steps_done is not None:
            torch.manual_seed(stable_hash(f"{self._stream}:{self._steps_done}"))
            self._steps_done = None
