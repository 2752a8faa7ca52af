"""Settings of torchtitan's that cannot work with adapters, refused before any weight exists."""

import functools
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
from lora_converter.titan.job import NAME, base_of, full_phase_result
from lora_converter.titan.packed_base import wrong_with_packed_base
from lora_converter.titans import checks
from lora_converter.titans.chat_data import CHAT

MISSING_CONFIG_MODULE = (
    "LoRA is used, but job.custom_config_module is not set, so there is no [lora] section: "
    'add custom_config_module = "lora_converter.titan" under [job].'
)

FLOAT8 = "quantize.linear.float8"
"""Of a converter."""

_OF_THE_MACHINE = ("comm.", "fault_tolerance.", "job.config_file", "metrics.", "profiling.")
"""What may differ between ranks (see `titans.checks.shared_options`)."""


def compare_before_logging(log: Callable[[Any], None]) -> Callable[[Any], None]:
    """`JobConfig.maybe_log`, after a comparison over all ranks, whose differences they raise together."""

    @functools.wraps(log)
    def compare_and_log(self: Any) -> None:
        if hasattr(self, "lora"):
            agreed_options(checks.shared_options(self.to_dict(), _OF_THE_MACHINE))
        log(self)

    return compare_and_log


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
    checks.refuse_first(problem for find in wrong for problem in find(job_config))


def _wrong_folders(job_config: Any) -> Iterator[str]:
    lora, base = job_config.lora, base_of(job_config)
    yield from checks.wrong_folders(job_config.checkpoint, lora, base, assets="model.hf_assets_path")


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
    if job_config.optimizer.early_step_in_backward:
        yield (
            "optimizer.early_step_in_backward = true: the adapters' gradients are complete only after "
            "the backward. Leave it at false; they take little memory."
        )
    ac, base = job_config.activation_checkpoint, base_of(job_config)
    keeps = dict(mode=ac.mode, keeps_rng_state=ac.preserve_rng_state)
    yield from checks.wrong_training(config, job_config.lora, base, **keeps)


def _wrong_results(job_config: Any) -> Iterator[str]:
    if job_config.lora.save_merged and job_config.lora.full_phase.steps > 0:
        yield (
            "lora.save_merged = true with lora.full_phase: the adapters' base is that phase's result, a DCP folder, "
            "and there is no Hugging Face folder to merge into. Leave save_merged at false."
        )
    yield from checks.wrong_results(job_config.checkpoint, job_config.lora, base_of(job_config))


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
