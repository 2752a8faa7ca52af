"""Frozen weights are stored in the dtype they are computed in; adapters stay in `training.dtype`.

A trained weight is kept in fp32 for the optimizer's sake and cast for every use. A frozen one has no optimizer: stored
in the compute dtype it takes half the memory and is never cast again, and the numbers are the same, since rounding
once gives what rounding at every use gave. Which weights are rounded, and whether at all, is torchtitan's rule:

    FSDP2, HSDP, CP     fully_shard casts every parameter to training.mixed_precision_param
    one rank, DDP       autocast casts the operands of matrix products: the weights of linears, but not of an
                        embedding, also where an output head shares it
    TP, PP alone        no mixed precision
"""

from typing import Any, cast

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims


def store_frozen_in_compute_dtype(model: nn.Module, job_config: Any, parallel_dims: ParallelDims) -> None:
    """Casts the frozen parameters of a converted model, in place, on the meta device.

    Tensor subclasses, such as float8 weights that FSDP2 gathers in float8, are left to those who made them.
    """
    dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    params = {param for param in model.parameters() if not param.requires_grad}
    if parallel_dims.tp_enabled or parallel_dims.pp_enabled:
        params = params if parallel_dims.fsdp_enabled else set()
    elif not parallel_dims.fsdp_enabled:
        params -= {p for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    for param in params:
        if type(param.data) is torch.Tensor and param.is_floating_point() and param.dtype.itemsize > dtype.itemsize:
            param.data = param.data.to(dtype)


def keep_cast_weights(model: nn.Module) -> None:
    """Lets frozen float8 linears keep their weight as it is cast, where it is whole on this rank. After sharding."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "keeps_cast_weight"):
            cast(Any, module).keeps_cast_weight = not sharded
