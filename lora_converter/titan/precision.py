"""Frozen weights are stored in the dtype they are computed in; adapters stay in `training.dtype`.

A trained weight is kept in fp32 for the optimizer's sake and cast for every use. A frozen one has no optimizer: stored
in the compute dtype it takes half the memory and is never cast again, and the numbers are the same, since rounding
once gives what rounding at every use gave. Which weights are rounded, and whether at all, is torchtitan's rule:

    FSDP2, HSDP, CP     fully_shard casts every parameter to training.mixed_precision_param
    one rank, DDP       autocast casts the operands of matrix products: the weights of linears
    TP, PP alone        no mixed precision
"""

import torch
import torch.nn as nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims


def store_frozen_in_compute_dtype(model: nn.Module, job_config, parallel_dims: ParallelDims) -> None:
    """Casts the frozen parameters of a converted model, in place, on the meta device.

    Tensor subclasses, such as float8 weights that FSDP2 gathers in float8, are left to those who made them.
    """
    dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    if parallel_dims.fsdp_enabled:
        modules = list(model.modules())
    elif parallel_dims.tp_enabled or parallel_dims.pp_enabled:
        return
    else:
        modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in modules:
        for param in module.parameters(recurse=False):
            if not param.requires_grad and type(param.data) is torch.Tensor and param.dtype.itemsize > dtype.itemsize:
                param.data = param.data.to(dtype)
