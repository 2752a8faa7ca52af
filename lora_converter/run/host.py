"""What a host gives to a LoRA run, and what it calls. `docs/contributing.md` tells how to add one.

A host is a trainer, with its way of building models and of configuring jobs. It

1. builds the model, calls `apply_lora` (with its `factor_class` and `canonical_name`, if it needs them), and lets
   `reset_adapters`, `mark_partial_gradients` and `freeze_base` follow its own initialisation of weights;
2. calls `sum_partial_gradients` once per step, before it clips;
3. makes one `Run` of what it is, and calls `load` before the first step, `ends_after` and `after_step` after each,
   `prepare_step` before it writes a step, `export` for a PEFT directory, `end` where `ends_after` said so and the step
   is written, and `finish` at the end, also after an error.

Nothing here imports a host.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_converter.experts import ExpertClasses
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.run.job import Job


class Host(Protocol):
    """A trainer, as a LoRA run on it sees it."""

    job: Job

    model_parts: list[nn.Module]
    """The models of this rank: one, or several pipeline stages."""

    states: dict[str, Any]
    """What a step holds beside the model: name -> Stateful of `optimizer`, `lr_scheduler`, `dataloader` and so on."""

    optimizers: list[Optimizer]
    """One for each of `model_parts`, with the job's hyperparameters."""

    lr_schedulers: list[LRScheduler]
    """One for each of `optimizers`, or none."""

    meshes: dict[str, DeviceMesh]
    """The one-dimensional meshes of more than one rank, by name. Pipeline stages lie along `pp`."""

    adapters_made_in: float
    """Seconds that the initial values of this rank's adapters took; for the log."""

    data_rank: int
    """Number of this rank among those that see other rows or other positions of a batch."""

    state_dict_adapter: StateDictAdapter | None
    """None where the host cannot express the model in Hugging Face's terms."""

    naming: StateDictAdapter | None
    """The same, to be asked for the names of single weights: an output head that is tied has one too."""

    def canonical_name(self, fqn: str) -> str:
        """A parameter's name on any host. Seeds and fingerprints go by it."""

    def on_log(self, look: Callable[[float], None]) -> None:
        """Has `look` called with the gradient norm whenever the host logs one; with the same on all ranks."""

    def around_trial_forwards(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Has the forwards that belong to no step made in `context()`: a pipeline finds its shapes by some."""

    def end_at(self, step: int) -> None:
        """Leaves nothing to train after `step`."""

    def end_process(self, exit_code: int) -> NoReturn:
        """Closes what the trainer has open, and ends the process: a signal asked for it, and the step is saved."""


@dataclass(frozen=True)
class HostModel:
    """One of a host's models, without a job.

    Attributes:
        model: On the meta device.
        state_dict_adapter: Its own, to be asked for the names of single weights.
        expert_classes: The host's routed experts.
        canonical_name: See `Host.canonical_name`.
    """

    model: nn.Module
    state_dict_adapter: StateDictAdapter
    expert_classes: ExpertClasses
    canonical_name: Callable[[str], str] = str


class ModelSource(Protocol):
    """What a host gives without a job: its models, for tools that read step folders."""

    def __call__(self, model: str, flavor: str, custom_import: str = "") -> HostModel:
        """One of them.

        Args:
            custom_import: Module to import first, which registers the model.

        Raises:
            ValueError: The host has no such model, or cannot express it in Hugging Face's terms.
        """
