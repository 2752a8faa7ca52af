"""torchtitan 0.2.2's checkpointer for a model with adapters."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torchtitan.components.checkpoint import CheckpointManager

from lora_converter.titan.host import TitanHost
from lora_converter.titans.checkpointer import RunCheckpointer
from lora_converter.titans.model import is_converted, lora_model


class LoRACheckpointManager(RunCheckpointer, CheckpointManager):
    """torchtitan's checkpointer over a `Run`."""

    def __init__(self, dataloader: Any, model_parts: list[nn.Module], *args: Any, **kwargs: Any):
        super().__init__(dataloader, model_parts, *args, **kwargs)
        model = lora_model(model_parts)
        adapter = self.sd_adapter if self.enable else None
        host = TitanHost(model_parts, self.states, adapter)
        host.prepare_trainer(model.lora_flops_not_spent)
        self.begin_run(host)

    def wait(self) -> None:
        """See `RunCheckpointer.wait`."""
        self._async_wait()


def choose_manager(init: Callable[..., None]) -> Callable[..., None]:
    """`CheckpointManager.__init__`, which makes itself a `LoRACheckpointManager` over a converted model."""

    @functools.wraps(init)
    def init_chosen(self: CheckpointManager, dataloader: Any, model_parts: Any = (), *args: Any, **kwargs: Any) -> None:
        if isinstance(self, LoRACheckpointManager) or not is_converted(model_parts):
            init(self, dataloader, model_parts, *args, **kwargs)
        elif type(self) is CheckpointManager:
            self.__class__ = LoRACheckpointManager
            LoRACheckpointManager.__init__(self, dataloader, model_parts, *args, **kwargs)
        else:
            raise ValueError(
                f"{type(self).__name__} cannot checkpoint a model with adapters. Derive it from "
                "lora_converter.titan.checkpoint.LoRACheckpointManager, or use torchtitan's own."
            )

    return init_chosen
