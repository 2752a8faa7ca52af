"""Which frozen weights are stored in the dtype they are computed in (`titans/precision.py`): torchtitan 0.2.2's rule.

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
from torchtitan.distributed import ParallelDims

from lora_converter.swap import swap_class
from lora_converter.titans.precision import frozen_parameters, store_in_compute_dtype
from lora_converter.trained import trained_modules


def store_frozen_in_compute_dtype(model: nn.Module, job_config: Any, parallel_dims: ParallelDims) -> None:
    """Casts the frozen parameters of a converted model, in place, on the meta device."""
    params = frozen_parameters(model)
    if parallel_dims.tp_enabled or parallel_dims.pp_enabled:
        params = params if parallel_dims.fsdp_enabled else set()
    elif not parallel_dims.fsdp_enabled:
        packed, trained = bool(job_config.lora.base_format), trained_modules(model).values()
        embeddings = [m for m in model.modules() if packed and isinstance(m, nn.Embedding) and m not in trained]
        others = [m for m in model.modules() if not isinstance(m, nn.Linear) and m not in embeddings]
        params -= {p for m in others for p in m.parameters(recurse=False)}
        for embedding in embeddings:
            swap_class(embedding, RoundedEmbedding).looked_up_dtype = embedding.weight.dtype
    store_in_compute_dtype(params, job_config.training)


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
