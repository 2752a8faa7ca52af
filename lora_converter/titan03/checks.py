"""Settings of torchtitan 0.3's that cannot work with adapters, refused before any weight exists."""

from collections.abc import Iterator
from typing import Any

from torchtitan.components import lora as host_lora

from lora_converter.ranks import agreed_options, together
from lora_converter.titans import checks, job


def check_settings(config: Any) -> None:
    """Refuses settings that cannot work with adapters, and ranks that were given different ones. On all ranks."""
    agreed_options(checks.shared_options(config.to_dict(), ("comm.", "metrics.", "profiler.", "model_spec.")))
    together(lambda: checks.refuse_first(_problems(config)))


def _problems(config: Any) -> Iterator[str]:
    checkpoint, lora, ac = config.checkpoint, config.lora, config.activation_checkpoint
    base = job.base_of(checkpoint, config.hf_assets_path)
    mode = type(ac).__qualname__.lower().removesuffix("ac.config")  # "full", "selective", "nonetype"
    yield from checks.wrong_folders(checkpoint, lora, base, assets="hf_assets_path")
    yield from checks.wrong_training(checkpoint, lora, base, mode=mode, keeps_rng_state=not ac or ac.preserve_rng_state)
    yield from checks.wrong_results(checkpoint, lora, base)
    if not config.training.disable_cuda_graphs:
        yield "training.disable_cuda_graphs = false: adapters are not tried in CUDA graphs. Set it to true."
    if tokens := lora.new_tokens:
        yield f"lora.new_tokens = {tokens}: 0.3 has no rows. Train them on torchtitan 0.2.2, or leave new_tokens out."
    if (chunk := lora.loss_chunk_tokens) > 0:
        yield f"lora.loss_chunk_tokens = {chunk}: the loss is torchtitan's. Leave it out, and set --loss.num_chunks."


def check_has_no_adapters(config: Any) -> None:
    """Raises a ValueError if a job has adapters already, ours or torchtitan's."""
    if hasattr(config, "lora"):
        raise ValueError("The config has adapters already. Call lora() once, with all settings.")
    if type(config.model_spec.model) in host_lora._frozen_config_class_cache.values():
        raise ValueError("The model has torchtitan's own LoRA. Leave it out of model_registry(converters=...).")
