"""A torchtitan 0.3 model with adapters: its config builds it so, and its class initialises them.

torchtitan's order: config -> `update_from_config` (shardings) -> `build` on meta -> pipeline split -> `parallelize` ->
compile, FSDP2 -> `to_empty` -> `init_weights` -> optimizer -> checkpointer. Adapters are there from `build` on.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import torch.nn as nn
from torchtitan.models.common.attention import FusedQKVLinear, QKVLinear
from torchtitan.protocols import BaseModel
from torchtitan.tools.logging import logger

from lora_converter.adapters import count_parameters
from lora_converter.run.job import Job
from lora_converter.swap import swap_class
from lora_converter.titan03.experts import EXPERT_CLASSES
from lora_converter.titan03.names import canonical_name
from lora_converter.titan03.sharding import TitanFactor, place_adapters
from lora_converter.titans.adapting import put_adapters, settle
from lora_converter.titans.compiling import allow_kinds_of_layers
from lora_converter.titans.flops import flops_not_spent
from lora_converter.titans.model import LoRAModel, describe
from lora_converter.titans.peft import check_results
from lora_converter.titans.precision import check_trained_dtype, frozen_parameters, store_in_compute_dtype


def with_adapters(job: Callable[[], Job], config: Any) -> BaseModel.Config:
    """The config of a job's model that builds it with adapters.

    Args:
        job: Asked once the model is built; its `config` says where.
        config: The trainer's.
    """
    model = config.model_spec.model
    made = made_of(_adapting(model.__class__), model)
    made.lora_job, made.lora_trainer_config = job, config
    return cast(BaseModel.Config, made)


def made_of(config_class: Any, config: Any, **more: Any) -> Any:
    """Copies of the settings that another class of configs has, too, and `more` of its own."""
    own = [f.name for f in fields(config_class) if f.init and f.name not in more and hasattr(config, f.name)]
    return config_class(**{name: copy.deepcopy(getattr(config, name)) for name in own}, **more)


@functools.cache
def _adapting(config_class: Any) -> Any:
    """A subclass of a model's config class, whose `build` puts adapters on."""

    def build(self: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = config_class.build(self, **kwargs)
        config, make_naming = self.lora_trainer_config, self.lora_trainer_config.model_spec.state_dict_adapter
        naming = make_naming and make_naming(self, None)
        said: Job = self.lora_job()
        try:
            check_trained_dtype(config)
            job = settle(said, model, naming, EXPERT_CLASSES, canonical_name)
            adapted = put_adapters(
                model, job, naming, EXPERT_CLASSES, factor_class=TitanFactor, canonical_name=canonical_name
            )
            place_adapters(model)
            check_results(job, model, naming, adapted)
        except ValueError as e:
            raise ValueError(f"{said.model}/{said.flavor}: {e}") from None
        store_in_compute_dtype(frozen_parameters(model), config.training)  # FSDP2 is always there, and casts all
        allow_kinds_of_layers(model, config)
        converted = swap_class(model, LoRAModel)
        converted.lora_job = job
        logger.info(describe(count_parameters(model), job.config))
        return model

    def get_nparams_and_flops(self: Any, model: Any, seq_len: int) -> tuple[int, int]:
        count = functools.partial(config_class.get_nparams_and_flops, self)
        params, flops = count(model, seq_len)
        return params, flops - flops_not_spent(model, seq_len, count)

    own = {"build": build, "get_nparams_and_flops": get_nparams_and_flops}
    return type(f"LoRA{config_class.__name__}", (config_class,), own)


def unfuse_qkv(config: BaseModel.Config) -> None:
    """Takes q, k and v of attention apart, in place: linears of their own, under the same checkpoint keys."""
    init = {"weight": functools.partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}
    for _, fused, parent, name in list(config.traverse(FusedQKVLinear.Config)):
        assert isinstance(fused, FusedQKVLinear.Config)
        whole, head_dim = fused.wqkv, fused.head_dim

        def linear(heads: int, whole: Any = whole, head_dim: int = head_dim) -> Any:
            return replace(whole, out_features=heads * head_dim, param_init=init)  # of its class: float8, say

        apart = QKVLinear.Config(head_dim=head_dim, wq=linear(fused.n_heads), wkv=linear(fused.n_kv_heads))
        setattr(parent, cast(str, name), apart)
