"""The `"lora"` model converter: check in `__init__`, mutate in `convert`, register on the last line.

torchtitan's order: model on meta -> `convert` -> pipeline split (a deep copy per stage) -> TP, CP, AC, compile, FSDP
-> `to_empty` -> `init_weights` -> optimizer -> checkpointer. Adapters are there from `convert` on, so everything
after acts on them as on any parameter; their values come with `init_weights`.
"""

import torch
import torch.nn as nn
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseStateDictAdapter, model_converter
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from lora_converter.apply import ParameterCount, apply_lora, count_parameters, freeze_base, reset_adapters
from lora_converter.config import LoRAConfig
from lora_converter.gradients import mark_partial_gradients
from lora_converter.linear import subclass_with
from lora_converter.peft import is_peft_directory
from lora_converter.titan import checkpoint, optimizer
from lora_converter.titan.flops import flops_not_spent
from lora_converter.titan.job_config import MISSING_CONFIG_MODULE, LoRA, check_phase, check_settings
from lora_converter.titan.peft_bridge import (
    check_exportable,
    check_mergeable,
    linear_shapes,
    load_peft_everywhere,
    settings_of_peft,
)
from lora_converter.titan.precision import keep_cast_weights, store_frozen_in_compute_dtype
from lora_converter.titan.ranks import agreed, together
from lora_converter.titan.selective_ac import count_as_products

NAME, FLOAT8 = "lora", "quantize.linear.float8"


class LoRAModel(nn.Module):
    """What a converted model's class gains: `init_weights` also initialises the adapters.

    The class is swapped, no method is bound to the instance: pipeline stages are deep copies, and a bound method
    would initialise the original.
    """

    lora_settings: LoRA
    lora_seed: int
    lora_flops_not_spent: int
    """Per token, of those that torchtitan counts for the whole model."""

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Base first, then the adapters. Freezes again: `SequenceParallel` rebuilds norms as trainable."""
        super().init_weights(buffer_device=buffer_device)  # type: ignore[misc]
        reset_adapters(self, seed=self.lora_seed)
        mark_partial_gradients(self)
        optimizer.mark_mean_gradients(self)
        freeze_base(self)
        freeze_routing(self)
        count_as_products(self)
        keep_cast_weights(self)


class LoRAConverter:
    """Fine-tunes low-rank adapters on the frozen model (torchtitan's ModelConverter protocol).

    Raises:
        ValueError: The `[lora]` section is missing, "lora" stands twice or before a quantization converter, or the
            checkpoint settings cannot work with adapters.
    """

    def __init__(self, job_config, parallel_dims: ParallelDims):
        if not hasattr(job_config, "lora"):
            raise ValueError(MISSING_CONFIG_MODULE)
        check_converter_order(job_config.model.converters)
        together(lambda: check_settings(job_config))
        check_phase(job_config)
        warn_of_wrong_router_gradients(parallel_dims)
        check_float8(job_config, parallel_dims)
        self.job_config, self.parallel_dims = job_config, parallel_dims
        self.config: LoRA = job_config.lora
        self.model_name = f"{job_config.model.name}/{job_config.model.flavor}"
        self.seed = job_config.debug.seed or 0
        self.adapter_dtype = TORCH_DTYPE_MAP[job_config.training.dtype]
        checkpoint.use_for_lora_models()
        optimizer.install()

    def convert(self, model: nn.Module) -> None:
        """Adapters on the selected linears, everything else frozen, the model's class swapped. In place."""
        try:
            path = self.config.initial_adapter_path
            if path and agreed(is_peft_directory(path), f"Whether {path} is a PEFT directory"):
                self.config = self.job_config.lora = self._settings_of_peft(model)
            if FLOAT8 in self.job_config.model.converters:
                from lora_converter.titan.float8 import freeze_float8_linears  # torchao is an extra

                freeze_float8_linears(model)
            adapted = apply_lora(model, self.config, seed=self.seed, dtype=self.adapter_dtype)
            if self.job_config.checkpoint.enable and self.job_config.checkpoint.last_save_in_hf:
                self._check_results(model, [linear.lora_fqn for linear in adapted])
        except ValueError as e:
            raise ValueError(f"{self.model_name}: {e}") from None
        store_frozen_in_compute_dtype(model, self.job_config, self.parallel_dims)
        model.lora_settings = self.config  # type: ignore[assignment]
        model.lora_seed = self.seed  # type: ignore[assignment]
        model.lora_flops_not_spent = flops_not_spent(model, self.job_config.training.seq_len)  # type: ignore[assignment]
        model.__class__ = subclass_with(LoRAModel, type(model))  # type: ignore[arg-type]
        logger.info(describe(count_parameters(model), self.config))

    def _check_results(self, model: nn.Module, adapted: list[str]) -> None:
        """That what is to be written at the end can be, before the training."""
        adapter, linears = self._state_dict_adapter(model), linear_shapes(model)
        check_exportable(adapter, linears, adapted)
        if self.config.save_merged and adapter is not None:
            base = self.job_config.checkpoint.initial_load_path or self.job_config.model.hf_assets_path
            together(lambda: check_mergeable(adapter, linears, adapted, base))

    def _settings_of_peft(self, model: nn.Module) -> LoRA:
        adapter = self._state_dict_adapter(model)
        if adapter is None:
            raise ValueError("lora.initial_adapter_path: the model has no StateDictAdapter to name PEFT's modules by.")
        peft = load_peft_everywhere(self.config.initial_adapter_path)
        return settings_of_peft(self.config, peft, adapter, linear_shapes(model))

    def _state_dict_adapter(self, model: nn.Module) -> BaseStateDictAdapter | None:
        spec = get_train_spec(self.job_config.model.name)
        return spec.state_dict_adapter and spec.state_dict_adapter(model.model_args, None)  # type: ignore[arg-type]

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do after a step."""


def check_converter_order(converters: list[str]) -> None:
    """Adapters sit on linears that are quantized already, and are not quantized themselves.

    Raises:
        ValueError: `"lora"` stands twice, or a quantization converter stands after it.
    """
    if converters.count(NAME) > 1:
        once = list(dict.fromkeys(converters))
        raise ValueError(f'model.converters = {converters}: "lora" stands twice. Write {once}.')
    late = [name for name in converters[converters.index(NAME) :] if _quantizes(name)]
    if late:
        right = [name for name in converters if name not in late and name != NAME] + late + [NAME]
        raise ValueError(
            f'model.converters = {converters}: {", ".join(late)} stands after "lora" and would quantize the adapters. '
            f"Write {right}."
        )


def _quantizes(name: str) -> bool:
    return issubclass(model_converter._registry_model_converter_cls[name], QuantizationConverter)


def check_float8(job_config, parallel_dims: ParallelDims) -> None:
    """Refuses the one float8 layout in which adapters would be given float8 inputs.

    Raises:
        ValueError: Tensorwise float8 under tensor parallelism: torchtitan casts the inputs of its linears before them.
    """
    if FLOAT8 not in job_config.model.converters or not parallel_dims.tp_enabled:
        return
    if job_config.quantize.linear.float8.recipe_name not in ("rowwise", "rowwise_with_gw_hp"):
        raise ValueError(
            "quantize.linear.float8 with tensor parallelism: torchtitan casts the inputs of tensorwise float8 linears "
            'before they reach the adapters. Set quantize.linear.float8.recipe_name = "rowwise".'
        )


def warn_of_wrong_router_gradients(parallel_dims: ParallelDims) -> None:
    """torchtitan 0.2.2 alone, all weights training: 1 rank against EP 2 x TP 2, the gate's gradient is half of what it
    should be. What flows back through it to the adapters is off by 1e-4 relative, on a small model.
    """
    if parallel_dims.ep_enabled and parallel_dims.tp_enabled and parallel_dims.etp == 1:
        logger.warning(
            "LoRA: expert_parallel_degree > 1 with tensor_parallel_degree > 1 and expert_tensor_parallel_degree = 1: "
            "torchtitan 0.2.2 computes the MoE router's gradient wrongly there, and the adapters' a little. Set "
            "parallelism.expert_tensor_parallel_degree to the tensor parallel degree for the gradients of one rank."
        )


def freeze_routing(model: nn.Module) -> None:
    """Stops the load balancing of MoE layers, which moves the router's `expert_bias` with every optimizer step.

    The bias is part of the base: an adapter that was trained on a moved one would not fit the base it is loaded on.
    torchtitan reads the coefficient when the optimizer is built, after `init_weights`.
    """
    for module in model.modules():
        if getattr(module, "load_balance_coeff", None) is not None:
            module.load_balance_coeff = None  # type: ignore[assignment]


def describe(count: ParameterCount, config: LoRAConfig) -> str:
    """One log line with counts."""
    return (
        f"LoRA: {count.adapted} linears adapted (rank {config.rank}, alpha {config.alpha:g}), "
        f"{_short(count.trainable)} of {_short(count.total)} parameters train "
        f"({100 * count.trainable / count.total:.2f} %)"
    )


def _short(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


model_converter.register_model_converter(LoRAConverter, NAME)
