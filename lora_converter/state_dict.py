"""The adapters of a model as a dict of tensors, out and in, whatever the model's layout.

Names are those of `adapter_parameters`: `<fqn>.lora_a.weight` (rank, in_features), `<fqn>.lora_b.weight` (out_features,
rank). A pipeline stage has those of its own layers. Loading checks every name and shape before it writes one value.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from lora_converter.apply import adapted_linears, adapter_parameters, adapters_at_rest
from lora_converter.config import LoRAConfig
from lora_converter.linear import copy_full_

T = TypeVar("T")


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """FQN of each adapted linear -> its adapter's settings: `.rank`, `.alpha`, `.dropout`, `.scaling`."""
    return {linear.lora_fqn: linear.lora_config for linear in adapted_linears(model)}


def split_state_dict(state_dict: Mapping[str, T], model: nn.Module) -> tuple[dict[str, T], dict[str, T]]:
    """A model's state dict as two: its adapters' entries, and the rest, which is the base's own state dict.

    Entries are told apart by what the model declares to be an adapter's, whatever their names contain.
    """
    names = adapter_parameters(model).keys()
    adapter = {name: value for name, value in state_dict.items() if name in names}
    return adapter, {name: value for name, value in state_dict.items() if name not in names}


@torch.no_grad()
def adapter_state_dict(model: nn.Module, *, full: bool = True) -> dict[str, torch.Tensor]:
    """The adapters' values, detached.

    Args:
        full: Whole tensors, copied; a collective on sharded models, call it on all ranks. Otherwise the parameters' own
            tensors, DTensors where they are sharded.

    Raises:
        ValueError: The model has no adapters.
    """
    found = {}
    for linear in adapters_at_rest(model):
        for name in linear.adapter_parameter_names:
            value = linear.get_parameter(name).detach()
            if full:
                value = value.full_tensor() if isinstance(value, DTensor) else value.clone()
            found[f"{linear.lora_fqn}.{name}"] = value
    return found


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Copies values into the adapters: every name and shape is checked first. Call it on all ranks.

    Args:
        state_dict: Whole tensors on every rank, or DTensors, of any floating dtype.
        strict: Names that are no adapter of the model, and a model without adapters, are an error. Without it they are
            left alone, as a pipeline stage needs that is given the whole model's; what the model has must be there all
            the same.

    Raises:
        ValueError: The model has no adapters, or names or shapes do not fit; all are named and nothing is written.
    """
    if strict or adapter_parameters(model):
        adapters_at_rest(model)
    params = adapter_parameters(model)
    missing = sorted(params.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - params.keys()) if strict else []
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)} there and {tuple(param.shape)} in the model"
        for name, param in params.items()
        if name in state_dict and state_dict[name].shape != param.shape
    ]
    problems = [f"{len(missing)} names are missing: {', '.join(missing)}."] if missing else []
    problems += [f"{len(unknown)} names are no adapter of it: {', '.join(unknown)}."] if unknown else []
    problems += [f"{len(misshapen)} have another shape: {', '.join(misshapen)}."] if misshapen else []
    if problems:
        raise ValueError(f"The state dict does not fit the model's adapters. {' '.join(problems)}")
    for name, param in params.items():
        value = state_dict[name]
        copy_full_(param, value.full_tensor() if isinstance(value, DTensor) else value)
