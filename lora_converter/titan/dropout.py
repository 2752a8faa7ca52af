"""Dropout masks that a resumed run draws again.

torchtitan does not store the state of random generators, and what a process draws before its first step is not what an
uninterrupted one had drawn. So the generator is seeded anew before each step, from the job's seed and the step. Ranks
that see other rows or other positions (data and context parallelism) draw other masks; tensor-parallel ranks, which see
the same rows, draw the same.
"""

from typing import Any

import torch
import torch.nn as nn

from lora_converter.linear import stable_hash


class DropoutSeeds:
    """Seeds the generator before the first forward of each step.

    Args:
        trainer: torchtitan's Trainer, after `set_determinism`.
        model_parts: The models whose forward begins a step; several with pipeline stages.
    """

    def __init__(self, trainer: Any, model_parts: list[nn.Module]):
        mesh = trainer.parallel_dims.get_optional_mesh("loss")  # data x context parallelism
        rank = mesh.get_local_rank() if mesh is not None else 0
        self._stream = f"{torch.initial_seed()}:{rank}"  # torchtitan gives pipeline ranks different seeds
        self._steps_done: int | None = 0
        for part in model_parts:
            part.register_forward_pre_hook(self._seed)

    def continue_after(self, step: int) -> None:
        """The next training forward belongs to step + 1."""
        self._steps_done = step

    def _seed(self, model: nn.Module, args: Any) -> None:
        if model.training and self._steps_done is not None:
            torch.manual_seed(stable_hash(f"{self._stream}:{self._steps_done}"))
            self._steps_done = None
