"""torchtitan 0.3's optimizers over the adapters alone: one for each pipeline stage, also for one that has none."""

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig


class LoRAOptimizers(OptimizersContainer):
    """torchtitan's container, which accepts a stage that is frozen."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's."""

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> Any:
        if any(param.requires_grad for param in model.parameters()):
            return OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
        (group,) = param_group_configs
        empty = {"params": [], "param_names": [], **impl_kwargs, **group.optimizer_kwargs}
        return {group.optimizer_name: [empty]}, {group.optimizer_name: [group.pattern]}

    def _post_init(self, all_params: list[nn.Parameter]) -> None:
        Optimizer.__init__(self, all_params or [{"params": []}], {})
