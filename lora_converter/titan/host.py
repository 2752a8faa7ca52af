"""torchtitan 0.2.2's trainer as the host of a LoRA run."""

from collections.abc import Callable
from typing import Any

import torch.nn as nn

from lora_converter.hf.naming import StateDictAdapter
from lora_converter.titan.head import skip_logits
from lora_converter.titan.installed import change_trainer
from lora_converter.titan.models import for_names
from lora_converter.titan.optimizer import divide_pipeline_gradients
from lora_converter.titans import host
from lora_converter.titans.compiling import compiles, first_step_told


class TitanHost(host.TitanHost):
    """See `titans.host.TitanHost`."""

    def __init__(self, model_parts: list[nn.Module], states: dict[str, Any], adapter: StateDictAdapter | None):
        super().__init__(model_parts, states, adapter, for_names(adapter))

    def prepare_trainer(self, not_spent: int) -> None:
        """Makes the changes to this trainer that every LoRA run needs.

        Args:
            not_spent: FLOPs per token that torchtitan counts too many.
        """
        skip_logits(self.trainer)
        divide_pipeline_gradients(self.trainer)
        if compiles(self.trainer.job_config):
            change_trainer(self.trainer, "train_step", first_step_told)
        change_trainer(self.trainer, "metrics_processor.num_flops_per_token", lambda flops: flops - not_spent)
        if self.trainer.job_config.lora.full_phase.steps > 0:
            log_phase(self.trainer, 2)

    def canonical_name(self, fqn: str) -> str:
        """torchtitan 0.2.2's names are the canonical ones."""
        return fqn

    def change(self, target: str, make: Callable[[Any], Any]) -> None:
        """See `change_trainer`."""
        change_trainer(self.trainer, target, make)


def log_phase(trainer: Any, number: int) -> None:
    """Adds `lora/phase` to what the trainer logs at each step."""

    def with_phase(log: Callable[..., None]) -> Callable[..., None]:
        def log_with_phase(*args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
            log(*args, extra_metrics={**(extra_metrics or {}), "lora/phase": number}, **kwargs)

        return log_with_phase

    change_trainer(trainer, "metrics_processor.log", with_phase)
