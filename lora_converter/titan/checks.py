"""Settings of torchtitan's that cannot work with adapters, refused before any weight exists."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn as nn
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts
from torchtitan.protocols import model_converter
from torchtitan.tools.logging import logger

from lora_converter.ranks import agreed_options
from lora_converter.run.description import PARTS
from lora_converter.titan.job import CHAT, NAME, base_of, full_phase_result
from lora_converter.titan.packed_base import wrong_with_packed_base

MISSING_CONFIG_MODULE = (
    "LoRA is used, but job.custom_config_module is not set, so there is no [lora] section: "
    'add custom_config_module = "lora_converter.titan" under [job].'
)

FLOAT8 = "quantize.linear.float8"
"""Of a converter."""

_OF_THE_MACHINE = ("comm.", "fault_tolerance.", "job.config_file", "metrics.", "profiling.")
"""What may differ between ranks of the job config, but for how often metrics are reduced over them."""


def compare_before_logging(log: Callable[[Any], None]) -> Callable[[Any], None]:
    """`JobConfig.maybe_log`, after a comparison over all ranks, whose differences they raise together."""

    @functools.wraps(log)
    def compare_and_log(self: Any) -> None:
        if hasattr(self, "lora"):
            agreed_options(_options(self))
        log(self)

    return compare_and_log


def _options(job_config: Any) -> dict[str, Any]:
    """The options that must be the same on all ranks, as they are written on the command line."""
    sections = job_config.to_dict().items()
    options = {f"{name}.{option}": value for name, section in sections for option, value in section.items()}
    return {n: value for n, value in options.items() if n == "metrics.log_freq" or not n.startswith(_OF_THE_MACHINE)}


def require_config_module(args: list[str]) -> None:
    """Says what is missing where torchtitan would only say that it does not know `[lora]` or `"lora"`.

    Args:
        args: The command line, as torchtitan's ConfigManager gets it.

    Raises:
        ValueError: The TOML file uses LoRA, but no `job.custom_config_module` brings its section.
    """
    manager = ConfigManager()
    toml = manager._maybe_load_toml(args) or {}
    uses_lora = "lora" in toml or "lora" in toml.get("model", {}).get("converters", [])
    if uses_lora and manager._maybe_add_custom_config(args, toml) is manager.config_cls:
        raise ValueError(MISSING_CONFIG_MODULE)


def check_phase(job_config: Any) -> None:
    """Refuses a job of two phases that was started where only the second would run.

    Raises:
        ValueError: The base is not the result of the first phase.
    """
    steps = job_config.lora.full_phase.steps
    if steps > 0 and job_config.checkpoint.initial_load_path != full_phase_result(job_config):
        raise ValueError(
            f"lora.full_phase.steps = {steps}: torchtitan's own entry trains one phase. Start the job with "
            "`torchrun ... -m lora_converter.train`."
        )


def check_settings(job_config: Any) -> None:
    """Refuses settings of the host that cannot work with adapters.

    Raises:
        ValueError: What was set, and what to do.
    """
    wrong = (_wrong_folders, wrong_with_packed_base, _wrong_training, _wrong_results)
    for refused in (problem for find in wrong for problem in find(job_config)):
        raise ValueError(refused)


def _wrong_folders(job_config: Any) -> Iterator[str]:
    config, adapter, base = job_config.checkpoint, job_config.lora.initial_adapter_path, base_of(job_config)
    if not config.enable and (base or adapter):
        option = "checkpoint.initial_load_path" if base else "lora.initial_adapter_path"
        yield f"{option} is set, but nothing is loaded with checkpoint.enable = false. Set it to true."
    if base and not os.path.isdir(base.path):
        option = "checkpoint.initial_load_path" if config.initial_load_path else "model.hf_assets_path"
        yield f"{option} = {base.path!r}: there is no such folder. Name the folder of the pretrained base."
    if adapter and not os.path.isdir(adapter):
        yield (
            f"lora.initial_adapter_path = {adapter!r}: there is no such folder. Name a step folder or a PEFT directory."
        )


def _wrong_training(job_config: Any) -> Iterator[str]:
    config, parallelism = job_config.checkpoint, job_config.parallelism
    two_phases = job_config.lora.full_phase.steps > 0
    under_tp = parallelism.tensor_parallel_degree > 1 and parallelism.data_parallel_shard_degree != 1
    if two_phases and not config.enable:
        yield "lora.full_phase hands its result on as a checkpoint: set checkpoint.enable = true."
    if two_phases and config.initial_load_in_hf and under_tp:
        yield (
            "lora.full_phase with checkpoint.initial_load_in_hf = true under FSDP2 x TP: torchtitan 0.2.2 loads the "
            "base of that phase, and may give it other rows of q and k there. Convert the base to DCP first: a job "
            'without "lora" and TP, of one step with optimizer.lr = 0, saves it.'
        )
    if two_phases and job_config.lora.new_tokens:
        yield "lora.new_tokens with lora.full_phase, whose tokenizer and model lack them. Leave one of the two out."
    data = job_config.lora.full_phase.dataset or job_config.training.dataset
    under_ddp = parallelism.data_parallel_replicate_degree > 1 and parallelism.data_parallel_shard_degree == 1
    if two_phases and data.lower() == CHAT and (under_ddp or parallelism.pipeline_parallel_degree > 1):
        layout = "DDP" if under_ddp else "pipeline parallelism"
        yield (
            f"lora.full_phase on conversations under {layout}: torchtitan 0.2.2 clips other gradients there than on "
            "one rank. Set another layout, or lora.full_phase.dataset to text."
        )
    if base_of(job_config) and not config.initial_load_model_only:
        yield (
            "checkpoint.initial_load_model_only = false: the base's optimizer state does not fit the adapters. "
            "Leave it at true; a LoRA run resumes from its own checkpoint folder."
        )
    if job_config.optimizer.early_step_in_backward:
        yield (
            "optimizer.early_step_in_backward = true: the adapters' gradients are complete only after "
            "the backward. Leave it at false; they take little memory."
        )
    ac, dropout = job_config.activation_checkpoint, job_config.lora.dropout
    if dropout > 0 and ac.mode in ("full", "selective") and not ac.preserve_rng_state:
        yield (
            f"lora.dropout = {dropout:g} with activation_checkpoint.mode = {ac.mode!r} and "
            "activation_checkpoint.preserve_rng_state = false: what is recomputed would draw other masks than the "
            "forward had. Set preserve_rng_state = true."
        )
    if unknown := [name for name in config.exclude_from_loading if name and name not in PARTS]:
        yield (
            f"checkpoint.exclude_from_loading: {', '.join(map(repr, unknown))} is no part of a checkpoint; the parts "
            f"are {', '.join(PARTS)}."
        )


def _wrong_results(job_config: Any) -> Iterator[str]:
    config, merges = job_config.checkpoint, job_config.lora.save_merged
    if merges and job_config.lora.full_phase.steps > 0:
        yield (
            "lora.save_merged = true with lora.full_phase: the adapters' base is that phase's result, a DCP folder, "
            "and there is no Hugging Face folder to merge into. Leave save_merged at false."
        )
    if merges and not (config.last_save_in_hf and config.initial_load_in_hf):
        yield (
            "lora.save_merged = true merges the last step's PEFT directory into a Hugging Face base: set "
            "checkpoint.last_save_in_hf = true and checkpoint.initial_load_in_hf = true."
        )
    if merges and config.initial_load_in_hf_quantized:
        yield (
            "lora.save_merged = true with checkpoint.initial_load_in_hf_quantized = true: quantized weights cannot be "
            "merged into. Leave save_merged at false and merge into an unquantized copy with `lora-converter merge`."
        )
    if config.last_save_in_hf and base_of(job_config) is None:
        yield (
            "checkpoint.last_save_in_hf = true: the adapter would be written without its base, which has no source and "
            "is stored nowhere else. Set checkpoint.initial_load_path, or leave it at false."
        )
    if config.last_save_in_hf and not config.last_save_model_only:
        yield (
            "checkpoint.last_save_in_hf = true makes the last step a PEFT directory, which cannot hold the optimizer: "
            "set checkpoint.last_save_model_only = true."
        )


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


def check_float8(job_config: Any, parallel_dims: ParallelDims) -> None:
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


def check_expert_biases(model: nn.Module, parallelism: Any) -> None:
    """Refuses the layout in which torchtitan 0.2.2's gpt_oss computes something else than on one rank.

    The ranks that share an expert each add its second bias, divided by the mesh's axis `tp`, which is called `etp`
    there. The loss of a small random model is off by 5e-4 relative, without any adapter on experts.

    Raises:
        ValueError: A gpt_oss under expert and tensor parallelism, with experts that are sharded by features.
    """
    degree = parallelism.expert_tensor_parallel_degree
    if min(degree, parallelism.expert_parallel_degree) == 1:
        return
    if any(isinstance(module, GptOssGroupedExperts) for module in model.modules()):
        raise ValueError(
            f"parallelism.expert_tensor_parallel_degree = {degree}: torchtitan 0.2.2 adds a bias of gpt_oss's experts "
            f"{degree} times there, so its outputs are not the model's. Leave out expert or tensor parallelism."
        )
