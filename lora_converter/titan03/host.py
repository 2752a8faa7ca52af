"""torchtitan 0.3's trainer as the host of a LoRA run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.nn as nn

from lora_converter.hf.naming import StateDictAdapter
from lora_converter.titan03.names import canonical_name
from lora_converter.titans import host


class TitanHost(host.TitanHost):
    """See `titans.host.TitanHost`."""

    def __init__(self, model_parts: list[nn.Module], states: dict[str, Any], adapter: StateDictAdapter | None):
        super().__init__(model_parts, states, adapter, adapter)

    def canonical_name(self, fqn: str) -> str:
        """See `Host.canonical_name`."""
        return canonical_name(fqn)

    def on_log(self, look: Callable[[float], None]) -> None:
        """See `Host.on_log`."""
        metrics = self.trainer.metrics_processor
        metrics.log = host.looked_at(look)(metrics.log)

    def around_trial_forwards(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """See `Host.around_trial_forwards`."""
        if self.trainer.parallel_dims.pp_enabled:
            schedule = self.trainer.pp_schedule
            schedule._initialize_pp_stages = host.outside_steps(context)(schedule._initialize_pp_stages)
