"""What a checkpoint of a LoRA run is made of, as DCP sees it: parts of the model, and a compact optimizer."""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_converter.names import owners
from lora_converter.new_tokens import trained_beside
from lora_converter.tensors import local_part

logger = logging.getLogger(__name__)

_GROUPS, _TRAINED = "param_groups.", "train_also."
_NAMES = ".param_names"
"""An option of groups that says which parameters are in them, on this rank; not stored."""


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
        param_groups.<option>   for its param_groups.<fqn>.<option> of all parameters; of what trains beside
                            the adapters (`trained_beside`), a group of its own, param_groups.train_also.<option>

    A parameter that never got a gradient has no state. A step is saved without it, which is told once.

    Args:
        optimizers: One for each of `model_parts`.
    """

    _options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model_parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]):
        stages = zip(model_parts, optimizers, strict=True)
        # A pipeline stage without adapters has nothing to store, which torch takes for an error.
        self._stages = [(part, opt) for part, opt in stages if any(group["params"] for group in opt.param_groups)]
        self._told = False

    def state_dict(self) -> dict[str, Any]:
        self._tell_what_has_no_state()
        compact: dict[str, Any] = {}
        for part, optimizer in self._stages:
            own = _names_of_trained(part)
            with _without_empty_groups(optimizer):
                values = get_optimizer_state_dict(part, optimizer, options=self._options)
            for name, value in values.items():
                if name.endswith(_NAMES):
                    continue
                value = _dequantized(value)
                stored = compact.setdefault(_once(name, own), value)
                assert stored is value or stored == value, name
        return compact

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in self._stages:
            own = _names_of_trained(part)
            with _without_empty_groups(optimizer):
                names = get_optimizer_state_dict(part, optimizer, options=self._options)
                values = {n: v if n.endswith(_NAMES) else state_dict[_once(n, own)] for n, v in names.items()}
                before = {param: {**state} for param, state in optimizer.state.items()}
                set_optimizer_state_dict(part, optimizer, values, options=self._options)
                _quantize_as(before, optimizer)

    def of_step(self, stored: Container[str]) -> Stateful:
        """The same, to be read from a step that stores those names. What has no state there starts afresh."""
        return _OptimizerOfStep(self, stored)

    def _tell_what_has_no_state(self) -> None:
        if self._told:
            return
        without = [
            name
            for part, optimizer in self._stages
            for name, param in part.named_parameters()
            if optimizer.state and param.requires_grad and param not in optimizer.state
        ]
        if without:
            self._told = True
            logger.warning(
                f"LoRA: {len(without)} parameters never got a gradient, and are saved without optimizer state, which "
                f"starts afresh when the run is resumed: {', '.join(without)}."
            )


@contextmanager
def _without_empty_groups(optimizer: Optimizer) -> Iterator[None]:
    """Groups that have no parameter on this pipeline stage are out of torch's way, which miscounts them."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        left = iter(optimizer.param_groups)
        optimizer.param_groups = [next(left) if group["params"] else group for group in groups]


def _dequantized(value: Any) -> Any:
    """A state that is quantized, torchao's 8-bit moments say, as what it stands for: DCP stores a plain tensor."""
    if not isinstance(value, torch.Tensor) or not _is_quantized(value):
        return value
    plain = local_part(value).dequantize()
    if not isinstance(value, DTensor):
        return plain
    mesh, placements, whole = value.device_mesh, value.placements, value.size()
    return DTensor.from_local(plain, mesh, placements, run_check=False, shape=whole, stride=value.stride())


@torch.no_grad()
def _quantize_as(before: Mapping[Any, Mapping[str, Any]], optimizer: Optimizer) -> None:
    """Puts what was loaded into the quantized states that were there before."""
    for param, state in optimizer.state.items():
        for name, old in before.get(param, {}).items():
            if isinstance(old, torch.Tensor) and _is_quantized(old) and not _is_quantized(state[name]):
                local_part(old).copy_(local_part(state[name]))
                state[name] = old


def _is_quantized(value: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(local_part(value))


class _OptimizerOfStep(Stateful):
    def __init__(self, whole: OptimizerState, stored: Container[str]):
        self._whole, self._stored = whole, stored

    def state_dict(self) -> dict[str, Any]:
        values = self._whole.state_dict()
        # A parameter that lacks some of its values alone is left in, and found missing.
        known = {_parameter(name) for name in values if name in self._stored}
        return {name: value for name, value in values.items() if name.startswith(_GROUPS) or _parameter(name) in known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        values = self._whole.state_dict()
        fresh = {name: value for name, value in values.items() if name not in state_dict}
        if fresh:
            names = sorted({_parameter(name) for name in fresh})
            logger.info(f"LoRA: {len(names)} parameters have no optimizer state in the step, and start afresh.")
        # torch fills a state by a step without gradients, which counts.
        fresh = {n: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for n, v in fresh.items()}
        self._whole.load_state_dict({**fresh, **state_dict})


def _names_of_trained(model: nn.Module) -> set[str]:
    """All names of what trains beside the adapters: of a tied weight torch may use another than was said."""
    trained = trained_beside(model)
    ids = {id(param) for param in trained.values()}
    return {*trained, *(name for name, param in owners(model) if id(param) in ids)}


def _parameter(name: str) -> str:
    """state.<fqn>.exp_avg -> state.<fqn>"""
    return name.rpartition(".")[0]


def _once(name: str, trained: Container[str]) -> str:
    if not name.startswith(_GROUPS):
        return name
    fqn, _, option = name.removeprefix(_GROUPS).rpartition(".")
    return f"{_GROUPS}{_TRAINED if fqn in trained else ''}{option}"
