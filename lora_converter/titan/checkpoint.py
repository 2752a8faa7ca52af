"""torchtitan's checkpointer for a model with adapters: it decides when, `run.Run` what is loaded and stored.

base      checkpoint.initial_load_path (DCP, or Hugging Face with initial_load_in_hf); read at every start
step-N    adapters, optimizer, scheduler, data loader and train state; no base weight
last step with checkpoint.last_save_in_hf, a PEFT directory instead
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.nn as nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.tools.logging import logger

from lora_converter.run.description import DATALOADER, MODEL, TRAIN_STATE
from lora_converter.run.initial_factors import InitialFactors, begins_at_the_base
from lora_converter.run.run import Run
from lora_converter.run.steps import discard, stale_steps
from lora_converter.titan.chat import ChatLoader
from lora_converter.titan.end_tokens import warn_of_untrained_tokens
from lora_converter.titan.host import TitanHost
from lora_converter.titan.model import is_converted, lora_model
from lora_converter.titan.packed_base import check_base_is_loaded


class LoRACheckpointManager(CheckpointManager):
    """torchtitan's checkpointer over a `Run`; see the module docstring for what is stored where."""

    def __init__(self, dataloader: Any, model_parts: list[nn.Module], *args: Any, **kwargs: Any):
        super().__init__(dataloader, model_parts, *args, **kwargs)
        self._ends = False
        model = lora_model(model_parts)
        adapter = self.sd_adapter if self.enable else None
        host = TitanHost(model.lora_job, model_parts, self.states, adapter)
        host.prepare_trainer(model.lora_flops_not_spent)
        self.run = Run(host)
        if not self.enable:
            return
        self.states.update(host.states, **{MODEL: self.run.model.stored})
        if self.run.job.base is None:
            logger.warning(
                "LoRA: checkpoint.initial_load_path is not set, so the base stays as initialised at random; "
                "every checkpoint stores it beside the adapters."
            )

    def load(self, step: int = -1) -> bool:
        """See `Run.load`; then a look at the tokens that conversations end with."""
        if not self.enable:
            check_base_is_loaded(self.run.job)
            if begins_at_the_base(self.run.job, None):
                InitialFactors(self.run.model).load()
            return False
        loaded = self.run.load(step)
        loader = self.states.get(DATALOADER)
        if loaded and isinstance(loader, ChatLoader):
            warn_of_untrained_tokens(self.run.host.model_parts, loader.trained_special_tokens())
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """torchtitan's `save`, which the trainer calls after every step, unless the adapters are not finite.

        Also of a step after which a signal ends the run.
        """
        self._ends = self.run.ends_after(curr_step)
        saves = self._should_save(curr_step, last_step)
        if self.run.after_step(curr_step, saves=saves):
            super().save(curr_step, last_step)
        elif saves:
            self._async_wait()  # for the last good one
        if self._ends:
            self._async_wait()
            self.run.end(curr_step)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self._ends or super()._should_save(curr_step, last_step)

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """torchtitan's, beside a description of the run, and never onto an older step."""
        self.run.prepare_step(checkpoint_id)
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def close(self) -> None:
        """torchtitan's, then the merged model."""
        super().close()
        if hasattr(self, "run"):
            self.run.finish()

    def _save_last_step(self, curr_step: int) -> None:
        if self.last_save_in_hf:
            self.run.export(curr_step)
        else:
            super()._save_last_step(curr_step)

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for path in stale_steps(self.folder, keep=self.keep_latest_k, current=self.states[TRAIN_STATE].step):
                try:
                    discard(path, wholly=False)
                except OSError as e:  # somebody has made it read-only; no reason to stop
                    logger.warning(f"LoRA: {path} cannot be removed ({e}).")
                else:
                    self.purge_queue.put(str(path))


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
