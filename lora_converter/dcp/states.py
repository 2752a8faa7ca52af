"""What a checkpoint of a LoRA run is made of, as DCP sees it: parts of the model, and a compact optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

_GROUPS = "param_groups."


class ModelSubset(Stateful):
    """The entries of a model's state dict, that of all its parts on this rank, whose names `keep` accepts."""

    def __init__(self, model_parts: Sequence[nn.Module], keep: Callable[[str], bool] = lambda name: True):
        self._model_parts, self._keep = model_parts, keep
        self._entries = self._read()

    def state_dict(self) -> dict[str, Any]:
        return self._entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self._model_parts:
            set_model_state_dict(part, state_dict, options=StateDictOptions(strict=False))
        self._entries = self._read()

    def _read(self) -> dict[str, Any]:
        entries = (entry for part in self._model_parts for entry in get_model_state_dict(part).items())
        return {name: value for name, value in entries if self._keep(name)}


class OptimizerState(Stateful):
    """The state of a run's optimizers with each hyperparameter stored once, not once per parameter.

    DCP spends over 1 KB on every value, and AdamW has twelve per parameter: for small adapters more than the adapter.
    All optimizers of a run are built from one set of hyperparameters and their schedules step together.

        state.<fqn>.exp_avg     as `torch.distributed.checkpoint.state_dict` flattens it
        param_groups.<option>   for its param_groups.<fqn>.<option> of all parameters

    Args:
        optimizers: One for each of `model_parts`.
    """

    _options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model_parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]):
        stages = zip(model_parts, optimizers, strict=True)
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
