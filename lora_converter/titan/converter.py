"""The `"lora"` model converter: check in `__init__`, mutate in `convert`, register on the last line.

torchtitan's order: model on meta -> `convert` -> pipeline split (a deep copy per stage) -> TP, CP, AC, compile, FSDP
-> `to_empty` -> `init_weights` -> optimizer -> checkpointer. Adapters are there from `convert` on, so everything
after acts on them as on any parameter; their values come with `init_weights`.
"""

from dataclasses import replace
from typing import Any, cast

import torch.nn as nn
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import model_converter
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from lora_converter.adapters import count_parameters
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.ranks import agreed, together
from lora_converter.run.job import Job
from lora_converter.swap import swap_class
from lora_converter.titan.checks import (
    FLOAT8,
    MISSING_CONFIG_MODULE,
    check_converter_order,
    check_expert_biases,
    check_float8,
    check_phase,
    check_settings,
    warn_of_wrong_router_gradients,
)
from lora_converter.titan.experts import EXPERT_CLASSES
from lora_converter.titan.installed import install
from lora_converter.titan.job import NAME, job_of
from lora_converter.titan.model import LoRAModel
from lora_converter.titan.models import for_names
from lora_converter.titan.new_tokens import grow_host, make_room, rows_of_base, trained_tokens
from lora_converter.titan.other_converters import check_sharded_linears
from lora_converter.titan.precision import store_frozen_in_compute_dtype
from lora_converter.titan.tied import mark_tied_head
from lora_converter.titans.adapting import put_adapters, settle
from lora_converter.titans.compiling import allow_kinds_of_layers
from lora_converter.titans.flops import flops_not_spent
from lora_converter.titans.model import describe
from lora_converter.titans.peft import check_results
from lora_converter.titans.precision import check_trained_dtype
from lora_converter.trained import tied_to_trained


class LoRAConverter:
    """Fine-tunes low-rank adapters on the frozen model (torchtitan's ModelConverter protocol).

    Raises:
        ValueError: The `[lora]` section is missing, "lora" stands twice or before a quantization converter, or the
            checkpoint settings cannot work with adapters.
    """

    def __init__(self, job_config: Any, parallel_dims: ParallelDims):
        if not hasattr(job_config, "lora"):
            raise ValueError(MISSING_CONFIG_MODULE)
        check_converter_order(job_config.model.converters)
        together(lambda: check_settings(job_config))
        check_phase(job_config)
        warn_of_wrong_router_gradients(parallel_dims)
        check_float8(job_config, parallel_dims)
        self.job_config, self.parallel_dims = job_config, parallel_dims
        self.model_name = f"{job_config.model.name}/{job_config.model.flavor}"
        install()  # a config module of the user's own may have been imported long before

    def convert(self, model: nn.Module) -> None:
        """Adapters on the selected linears and experts, all else frozen, the model's class swapped. In place."""
        job_config = self.job_config
        try:
            check_expert_biases(model, job_config.parallelism)
            if self.parallel_dims.tp_enabled:
                check_sharded_linears(model)
            naming = self._state_dict_adapter(model)
            job_config.lora = settle(job_of(job_config), model, naming, EXPERT_CLASSES).config
            if FLOAT8 in job_config.model.converters:
                from lora_converter.titan.float8 import freeze_float8_linears  # torchao is an extra

                freeze_float8_linears(model)
            check_trained_dtype(job_config)
            job = self._with_tokens(job_of(job_config), model)
            naming = self._state_dict_adapter(model)  # the model may have grown
            adapted = put_adapters(model, job, naming, EXPERT_CLASSES)
            check_results(job, model, naming, adapted)
        except ValueError as e:
            raise ValueError(f"{self.model_name}: {e}") from None
        store_frozen_in_compute_dtype(model, job_config, self.parallel_dims)
        mark_tied_head(model)
        allow_kinds_of_layers(model, job_config)
        model_args = cast(Any, model).model_args
        not_spent = flops_not_spent(model, job_config.training.seq_len, model_args.get_nparams_and_flops)
        converted = swap_class(model, LoRAModel)
        converted.lora_job, converted.lora_flops_not_spent = job, not_spent
        converted.lora_adapted = [module.lora_fqn for module in adapted]
        logger.info(describe(count_parameters(model), job.config))
        for name, others in tied_to_trained(model).items():
            logger.info(f"LoRA: {name} is {', '.join(others)} as well: one weight, trained once.")

    def _with_tokens(self, job: Job, model: nn.Module) -> Job:
        """The job, with the tokens whose rows train, for which the model has room then."""
        rows = getattr(getattr(model, "tok_embeddings", None), "num_embeddings", 0)
        stored = agreed(
            rows_of_base(job.base, self._state_dict_adapter(model), model), "The rows of the base's embedding"
        )
        if stored > rows:
            logger.info(f"LoRA: the base has {stored:,} rows of tokens, the flavor {rows:,}; the model has the base's.")
            grow_host(model, stored)
            rows = stored
        tokens = together(lambda: trained_tokens(self.job_config, rows)) if rows or job.config.new_tokens else {}
        if not tokens:
            return job
        base_rows, folder = make_room(model, tokens, self.parallel_dims), self.job_config.model.hf_assets_path
        return replace(job, tokens=tokens, base_rows=base_rows, tokenizer=folder)

    def _state_dict_adapter(self, model: nn.Module) -> StateDictAdapter | None:
        spec = get_train_spec(self.job_config.model.name)
        make = spec.state_dict_adapter
        return make and for_names(make(cast(Any, model).model_args, None))

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do after a step."""


model_converter.register_model_converter(LoRAConverter, NAME)
