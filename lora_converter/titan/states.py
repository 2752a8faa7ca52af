"""What a checkpoint of a LoRA run is made of, as DCP sees it: parts of the model, and a compact optimizer."""

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.components.optimizer import OptimizersContainer

_GROUPS = "param_groups."


class ModelSubset(ModelWrapper):
    """The entries of the model's state dict whose names `keep` accepts."""

    def __init__(self, model_parts: list[nn.Module], keep: Callable[[str], bool]):
        self._keep = keep
        super().__init__(model_parts)

    def _get_state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super()._get_state_dict().items() if self._keep(name)}


class OptimizerState(Stateful):
    """torchtitan's optimizer state with each hyperparameter stored once, not once per parameter.

    DCP spends over 1 KB on every value, and AdamW has twelve per parameter: for small adapters more than the adapter.
    torchtitan builds all its optimizers from one set of hyperparameters and steps their schedules together.

        state.<fqn>.exp_avg     as torchtitan's
        param_groups.<option>   for torchtitan's param_groups.<fqn>.<option> of all parameters
    """

    _options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, optimizers: OptimizersContainer):
        stages = zip(optimizers.model_parts, optimizers.optimizers, strict=True)
        # A pipeline stage without adapters has nothing to store, which torch takes for an error.
        self._stages = [(part, opt) for part, opt in stages if any(group["params"] for group in opt.param_groups)]

    def state_dict(self) -> dict[str, Any]:
        compact: dict[str, Any] = {}
        for part, optimizer in self._stages:
            for name, value in get_optimizer_state_dict(part, optimizer, options=self._options).items():
                stored = compact.setdefault(_once(name), value)
                assert stored is value or stored == value, name
        return compact

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in self._stages:
            names = get_optimizer_state_dict(part, optimizer, options=self._options)
            values = {name: state_dict[_once(name)] for name in names}
            set_optimizer_state_dict(part, optimizer, values, options=self._options)


def _once(name: str) -> str:
    return f"{_GROUPS}{name.rpartition('.')[2]}" if name.startswith(_GROUPS) else name
