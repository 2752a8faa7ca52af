"""`lora.base_format` on torchtitan 0.2.2: what it does not go with."""

from collections.abc import Iterator
from typing import Any

from lora_converter.run.job import AS_RELEASED
from lora_converter.titan.job import base_of


def wrong_with_packed_base(job_config: Any) -> Iterator[str]:
    """Settings that a packed base cannot be had with: what was set, and what to do."""
    form, lora = job_config.lora.base_format, job_config.lora
    if not form:
        return
    option, base = f"lora.base_format = {form!r}", base_of(job_config)
    if base is None and job_config.checkpoint.enable:
        yield (
            f"{option}: a random base cannot be packed, since every checkpoint would have to store it. Set "
            "checkpoint.initial_load_path to a pretrained base, or leave base_format out."
        )
    if lora.full_phase.steps > 0:
        yield (
            f"{option} with lora.full_phase.steps = {lora.full_phase.steps}: it trains every weight, and packed "
            "ones cannot. Train the phase as a job of its own, and set its result as the base of this one."
        )
    if quantizers := [name for name in job_config.model.converters if name.startswith("quantize.")]:
        yield (
            f"{option} with {', '.join(quantizers)} in model.converters: both say how frozen weights are stored. Leave "
            "out one of them."
        )
    if form == AS_RELEASED and base is not None and base.format != "hf":
        yield (
            f"{option} keeps the format of a Hugging Face folder, and {base.path} is read as a DCP folder. Set "
            'checkpoint.initial_load_in_hf = true, or base_format = "nf4".'
        )
