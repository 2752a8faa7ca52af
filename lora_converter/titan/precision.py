"""Frozen weights are stored in the dtype they are computed in; adapters stay in `training.dtype`.

A trained weight is kept in fp32 for the optimizer's sake and cast for every use. A frozen one has no optimizer: stored
in the compute dtype it takes half the memory and is never cast again, and the numbers are the same, since rounding
once gives what rounding at every use gave. Which weights are rounded, and whether at all, is torchtitan's rule:

    FSDP2, HSDP, CP     fully_shard casts every parameter to training.mixed_precision_param
    one rank, DDP       autocast casts the operands of matrix products: the weights of linears, but not of an
                        embedding, also where an output head shares it
    TP, PP alone        no mixed precision

Beside packed weights an embedding is most of what is left: on one rank it is stored rounded, too, and what is looked up
there is as wide as before.
"""

from typing import Any, cast

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims

from lora_converter.adapted import adapter_parameters
from lora_converter.swap import swap_class
from lora_converter.trained import trained_modules


def store_frozen_in_compute_dtype(model: nn.Module, job_config: Any, parallel_dims: ParallelDims) -> None:
    """Casts the frozen parameters of a converted model, in place, on the meta device.

    Tensor subclasses, such as float8 weights that FSDP2 gathers in float8, are left to those who made them.
    """
    dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    params = {param for param in model.parameters() if not param.requires_grad} - {*adapter_parameters(model).values()}
    if parallel_dims.tp_enabled or parallel_dims.pp_enabled:
        params = params if parallel_dims.fsdp_enabled else set()
    elif not parallel_dims.fsdp_enabled:
        packed, trained = bool(job_config.lora.base_format), trained_modules(model).values()
        embeddings = [m for m in model.modules() if packed and isinstance(m, nn.Embedding) and m not in trained]
        others = [m for m in model.modules() if not isinstance(m, nn.Linear) and m not in embeddings]
        params -= {p for m in others for p in m.parameters(recurse=False)}
        for embedding in embeddings:
            swap_class(embedding, RoundedEmbedding).looked_up_dtype = embedding.weight.dtype
    for param in params:
        if type(param.data) is torch.Tensor and param.is_floating_point() and param.dtype.itemsize > dtype.itemsize:
            param.data = param.data.to(dtype)


def check_trained_dtype(job_config: Any) -> None:
    """Refuses weights that train in full in less than fp32.

    Raises:
        ValueError: `training.dtype` is another.
    """
    dtype = job_config.training.dtype
    if job_config.lora.train_also and dtype != "float32":
        raise ValueError(
            f"lora.train_also with training.dtype = {dtype!r}: what trains is kept in fp32. Set training.dtype = "
            '"float32"; frozen weights are stored in training.mixed_precision_param all the same.'
        )


class RoundedEmbedding(nn.Embedding):
    """What an embedding's class gains whose weight is stored rounded."""

    looked_up_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (...), numbers of rows -> (..., embedding_dim), of the dtype that the weight had."""
        return super().forward(input).to(self.looked_up_dtype)


def keep_cast_weights(model: nn.Module) -> None:
    """Lets frozen float8 linears keep their weight as it is cast, where it is whole on this rank. After sharding."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "keeps_cast_weight"):
            cast(Any, module).keeps_cast_weight = not sharded
