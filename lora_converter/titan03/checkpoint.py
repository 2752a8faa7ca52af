"""torchtitan 0.3's checkpointer for a model with adapters."""

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torchtitan.components.checkpointer import CheckpointManager

from lora_converter.run.description import DATALOADER, LR_SCHEDULER, OPTIMIZER
from lora_converter.titan03.host import TitanHost
from lora_converter.titans.checkpointer import RunCheckpointer


class LoRACheckpointManager(RunCheckpointer, CheckpointManager):
    """torchtitan's checkpointer over a `Run`."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """torchtitan's."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module], states: Any, sd_adapter: Any, **kwargs: Any):
        super().__init__(config, model_parts=model_parts, states=states, sd_adapter=sd_adapter, **kwargs)
        if not self.enable:  # it has left its states at that
            own = {OPTIMIZER: "optimizers", LR_SCHEDULER: "lr_schedulers", DATALOADER: "dataloader"}
            self.states = states | {name: kwargs[argument] for name, argument in own.items()}
        self.begin_run(TitanHost(model_parts, self.states, sd_adapter))

    def wait(self) -> None:
        """See `RunCheckpointer.wait`."""
        self.maybe_wait_for_saving()
