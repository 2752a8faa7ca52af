"""Frozen weights are stored in the dtype they are computed in; adapters stay in `training.dtype`.

A trained weight is kept in fp32 for the optimizer's sake and cast for every use. A frozen one has no optimizer: stored
in the compute dtype it takes half the memory and is never cast again, and the numbers are the same, since rounding
once gives what rounding at every use gave. Which weights are cast, and whether at all, is each host's rule.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torchtitan.config import TORCH_DTYPE_MAP

from lora_converter.adapted import adapter_parameters


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those of the base, of a model with adapters."""
    return {param for param in model.parameters() if not param.requires_grad} - {*adapter_parameters(model).values()}


def store_in_compute_dtype(params: Iterable[nn.Parameter], training: Any) -> None:
    """Rounds parameters to `training.mixed_precision_param`, in place, on the meta device.

    Tensor subclasses, such as float8 weights that FSDP2 gathers in float8, are left to those who made them.
    """
    dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    for param in params:
        if type(param.data) is torch.Tensor and param.is_floating_point() and param.dtype.itemsize > dtype.itemsize:
            param.data = param.data.to(dtype)


def check_trained_dtype(config: Any) -> None:
    """Refuses weights that train in full in less than fp32.

    Args:
        config: A job's, with `training` and `lora`.

    Raises:
        ValueError: `training.dtype` is another.
    """
    dtype = config.training.dtype
    if config.lora.train_also and dtype != "float32":
        raise ValueError(
            f"lora.train_also with training.dtype = {dtype!r}: what trains is kept in fp32. Set training.dtype = "
            '"float32"; frozen weights are stored in training.mixed_precision_param all the same.'
        )
