"""What torchtitan's checkpointers gain over a `Run`: torchtitan decides when, the run what is loaded and stored.

base      checkpoint.initial_load_path (DCP, or Hugging Face with initial_load_in_hf); read at every start
step-N    adapters, optimizer, scheduler, data loader and train state; no base weight
last step with checkpoint.last_save_in_hf, a PEFT directory instead
"""

from typing import Any

import torch.distributed as dist
from torchtitan.tools.logging import logger

from lora_converter.run.description import DATALOADER, MODEL, TRAIN_STATE
from lora_converter.run.host import Host
from lora_converter.run.initial_factors import InitialFactors, begins_at_the_base
from lora_converter.run.names import in_canonical_names
from lora_converter.run.run import Run
from lora_converter.run.steps import discard, stale_steps
from lora_converter.titans.chat import ChatLoader
from lora_converter.titans.end_tokens import warn_of_untrained_tokens
from lora_converter.titans.packed_base import check_base_is_loaded

_CheckpointManager: Any = object
"""The next of a host's bases, for the type checker."""


class RunCheckpointer(_CheckpointManager):
    """Stands before torchtitan's CheckpointManager among the bases of a host's, whose `__init__` calls `begin_run`."""

    run: Run
    _ends = False

    def wait(self) -> None:
        """Until what is being saved is there."""
        raise NotImplementedError

    def begin_run(self, host: Host) -> None:
        """Makes the run, whose states are saved in place of the host's."""
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
        loaded, loader = self.run.load(step), self.states.get(DATALOADER)
        if loaded and isinstance(loader, ChatLoader):
            warn_of_untrained_tokens(self.run.host.model_parts, loader.trained_special_tokens())
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """torchtitan's `save`, which the trainer calls after every step, unless the adapters are not finite.

        Also of a step after which a signal ends the run.

        Returns:
            Whether it was called, where torchtitan's does not say whether it saved.
        """
        self._ends = self.run.ends_after(curr_step)
        saves, saved = self._should_save(curr_step, last_step), False
        if self.run.after_step(curr_step, saves=saves):
            saved = super().save(curr_step, last_step) is not False
        elif saves:
            self.wait()  # for the last good one
        if self._ends:
            self.wait()
            self.run.end(curr_step)
        return saved

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self._ends or bool(super()._should_save(curr_step, last_step))

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """torchtitan's, beside a description of the run, and never onto an older step."""
        self.run.prepare_step(checkpoint_id)
        state_dict = in_canonical_names(state_dict, self.run.host.canonical_name)
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
