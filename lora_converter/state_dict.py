"""The adapters of a model as a dict of tensors, out and in, whatever the model's layout.

Names are those of `adapter_parameters`: `<fqn>.lora_a.weight` (rank, in_features), `<fqn>.lora_b.weight` (out_features,
rank). A pipeline stage has those of its own layers. Loading checks every name and shape before it writes one value.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn as nn

from lora_converter.adapted import adapted_modules, adapter_parameters, adapters_at_rest
from lora_converter.config import LoRAConfig
from lora_converter.fit import Misfit
from lora_converter.names import known_key
from lora_converter.tensors import copy_, full_tensor

T = TypeVar("T")

_WORDS = {"missing": "names are missing", "unknown": "names are no adapter of it", "misshapen": "have another shape"}


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """FQN of each adapted module -> its adapter's settings: `.rank`, `.alpha`, `.dropout`, `.scaling`."""
    return {module.lora_fqn: module.lora_config for module in adapted_modules(model)}


def split_state_dict(state_dict: Mapping[str, T], model: nn.Module) -> tuple[dict[str, T], dict[str, T]]:
    """A model's state dict as two: its adapters' entries, and the rest, which is the base's own state dict.

    Entries are told apart by what the model declares to be an adapter's, whatever their names contain. The adapters'
    come under the plain model's names, whatever it has been wrapped in.
    """
    names = adapter_parameters(model).keys()
    adapter, rest = {}, {}
    for key, value in state_dict.items():
        name = known_key(key, names)
        if name in names:
            adapter[name] = value
        else:
            rest[key] = value
    return adapter, rest


@torch.no_grad()
def adapter_state_dict(model: nn.Module, *, full: bool = True) -> dict[str, torch.Tensor]:
    """The adapters' values, detached.

    Args:
        full: Whole tensors, copied; a collective on sharded models, call it on all ranks. Otherwise the parameters' own
            tensors, DTensors where they are sharded.

    Raises:
        ValueError: The model has no adapters.
    """
    adapters_at_rest(model)
    values = {name: param.detach() for name, param in adapter_parameters(model).items()}
    return {name: full_tensor(value).clone() for name, value in values.items()} if full else values


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Copies values into the adapters: every name and shape is checked first. Call it on all ranks.

    The parameters stay the same objects, so several adapters can take turns in one model: see docs/library.md.

    Args:
        state_dict: Whole tensors on every rank, or DTensors, of any floating dtype. Those that are sharded as the
            parameters are go there without communication.
        strict: Names that are no adapter of the model, and a model without adapters, are an error. Without it they are
            left alone, as a pipeline stage needs that is given the whole model's; what the model has must be there all
            the same.

    Raises:
        ValueError: The model has no adapters, or names or shapes do not fit; all are named and nothing is written.
    """
    if strict or adapter_parameters(model):
        adapters_at_rest(model)
    params = adapter_parameters(model)
    state_dict = {known_key(key, params): value for key, value in state_dict.items()}
    misfit = Misfit(
        missing=sorted(params.keys() - state_dict.keys()),
        unknown=sorted(state_dict.keys() - params.keys()) if strict else [],
    )
    for name, param in params.items():
        if name in state_dict:
            misfit.compare(name, state_dict[name].shape, param.shape)
    misfit.raise_if_any("The state dict does not fit the model's adapters.", words=_WORDS)
    for name, param in params.items():
        copy_(param, state_dict[name])


def set_adapter(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts one of several adapters into a model, which holds one at a time: `load_adapter_state_dict`, by PEFT's name.

    Args:
        state: Cloned from `adapter_state_dict(model, full=False)`, it goes in without communication; or whole tensors.
    """
    load_adapter_state_dict(model, state)
