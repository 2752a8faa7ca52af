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

from lora_converter.adapters import count_parameters
from lora_converter.run.job import Job, RunConfig
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


def with_adapters(job: Job, config: Any) -> BaseModel.Config:
    """The config of a job's model that builds it with adapters.

    Args:
        job: Its `config` says where.
        config: The trainer's.
    """
    model = config.model_spec.model
    made = _adapting(model.__class__)(**{f.name: getattr(model, f.name) for f in fields(model) if f.init})
    made.lora_job, made.lora_trainer_config = job, config
    return cast(BaseModel.Config, made)


@functools.cache
def _adapting(config_class: Any) -> Any:
    """A subclass of a model's config class, whose `build` puts adapters on."""

    def build(self: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = config_class.build(self, **kwargs)
        config, make_naming = self.lora_trainer_config, self.lora_trainer_config.model_spec.state_dict_adapter
        naming = make_naming and make_naming(self, None)
        try:
            check_trained_dtype(config)
            check_has_a_home(self.lora_job.config)
            job = settle(self.lora_job, model, naming, EXPERT_CLASSES, canonical_name)
            names = {"factor_class": TitanFactor, "canonical_name": canonical_name}
            adapted = put_adapters(model, job, naming, EXPERT_CLASSES, **names)
            place_adapters(model)
            check_results(job, model, naming, adapted)
        except ValueError as e:
            raise ValueError(f"{self.lora_job.model}/{self.lora_job.flavor}: {e}") from None
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


def check_has_a_home(config: RunConfig) -> None:
    """Refuses what `[lora]` has for torchtitan 0.2.2 alone.

    Raises:
        ValueError: The option is set.
    """
    if config.new_tokens:
        raise ValueError(
            "lora.new_tokens: a model of torchtitan 0.3 has the rows that its config says, and none for new tokens. "
            "Train them on torchtitan 0.2.2, or leave new_tokens out."
        )
    if config.loss_chunk_tokens > 0:
        raise ValueError(
            f"lora.loss_chunk_tokens = {config.loss_chunk_tokens}: torchtitan 0.3's loss has chunks of its own. Leave "
            "loss_chunk_tokens out, and set loss.num_chunks."
        )


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
