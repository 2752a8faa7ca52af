"""torchtitan 0.3's optimizers over what trains: one for each pipeline stage, also for one that has nothing of it."""

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from lora_converter.titans.optimizer import check_one_group, split_group


class LoRAOptimizers(OptimizersContainer):
    """torchtitan's container, which accepts a stage that is frozen, and gives `train_also` groups of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's."""

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> Any:
        check_one_group([group.pattern for group in param_group_configs])
        (said,) = param_group_configs
        if any(param.requires_grad for param in model.parameters()):
            groups, _ = OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
            (group,) = groups[said.optimizer_name]
        else:
            group = {"params": [], "param_names": [], **impl_kwargs, **said.optimizer_kwargs}
        parts = split_group([model], group)
        return {said.optimizer_name: parts}, {said.optimizer_name: [said.pattern] * len(parts)}

    def _post_init(self, all_params: list[nn.Parameter]) -> None:
        Optimizer.__init__(self, all_params or [{"params": []}], {})
