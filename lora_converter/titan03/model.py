"""A torchtitan 0.3 model with adapters: its config builds it so, and its class initialises them.

torchtitan's order: config -> `update_from_config` (shardings) -> `build` on meta -> pipeline split -> `parallelize` ->
compile, FSDP2 -> `to_empty` -> `init_weights` -> optimizer -> checkpointer. Adapters are there from `build` on.
"""

import functools
from dataclasses import fields
from typing import Any, cast

import torch.nn as nn
from torchtitan.models.common.attention import FusedQKVLinear, QKVLinear
from torchtitan.protocols import BaseModel
from torchtitan.tools.logging import logger

from lora_converter.adapters import apply_lora, count_parameters
from lora_converter.run.job import Job
from lora_converter.swap import swap_class
from lora_converter.titan03.names import canonical_name
from lora_converter.titan03.sharding import TitanFactor, place_adapters
from lora_converter.titans.model import LoRAModel, describe


def with_adapters(config: BaseModel.Config, job: Job) -> BaseModel.Config:
    """A model's config that builds it with adapters.

    Args:
        job: Its `config` says where.
    """
    made = _adapting(config.__class__)(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})
    made.lora_job = job
    return cast(BaseModel.Config, made)


@functools.cache
def _adapting(config_class: Any) -> Any:
    """A subclass of a model's config class, whose `build` puts adapters on."""

    def build(self: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = config_class.build(self, **kwargs)
        job: Job = self.lora_job
        apply_lora(model, job.config, seed=job.seed, factor_class=TitanFactor, canonical_name=canonical_name)
        place_adapters(model)
        converted = swap_class(model, LoRAModel)
        converted.lora_job = job
        logger.info(describe(count_parameters(model), job.config))
        return model

    return type(f"LoRA{config_class.__name__}", (config_class,), {"build": build, "lora_job": None})


def unfuse_qkv(config: BaseModel.Config) -> None:
    """Takes q, k and v of attention apart, in place: linears of their own, under the same checkpoint keys."""
    init = {"weight": functools.partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}
    for _, fused, parent, name in list(config.traverse(FusedQKVLinear.Config)):
        assert isinstance(fused, FusedQKVLinear.Config)
        whole, head_dim = fused.wqkv, fused.head_dim

        def linear(heads: int, whole: Any = whole, head_dim: int = head_dim) -> Any:
            return type(whole)(
                in_features=whole.in_features, out_features=heads * head_dim, bias=whole.bias, param_init=init
            )

        apart = QKVLinear.Config(head_dim=head_dim, wq=linear(fused.n_heads), wkv=linear(fused.n_kv_heads))
        setattr(parent, cast(str, name), apart)
