"""Settings that cannot work with adapters, by what both torchtitans call them; each host has more of its own."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from lora_converter.run.description import PARTS
from lora_converter.run.job import Base, RunConfig
from lora_converter.titans.job import as_written


def wrong_folders(checkpoint: Any, lora: RunConfig, base: Base | None, *, assets: str) -> Iterator[str]:
    """What is to be loaded and cannot be.

    Args:
        checkpoint: The host's section of that name.
        assets: The host's option for the folder of Hugging Face's assets.
    """
    adapter = lora.initial_adapter_path
    if not checkpoint.enable and (base or adapter):
        option = "checkpoint.initial_load_path" if base else "lora.initial_adapter_path"
        yield f"{option} is set, but nothing is loaded with checkpoint.enable = false. Set it to true."
    if base and not os.path.isdir(base.path):
        option = "checkpoint.initial_load_path" if checkpoint.initial_load_path else assets
        yield f"{option} = {base.path!r}: there is no such folder. Name the folder of the pretrained base."
    if adapter and not os.path.isdir(adapter):
        yield (
            f"lora.initial_adapter_path = {adapter!r}: there is no such folder. Name a step folder or a PEFT directory."
        )


def wrong_training(
    checkpoint: Any, lora: RunConfig, base: Base | None, *, mode: str, keeps_rng_state: bool
) -> Iterator[str]:
    """What would train something else.

    Args:
        mode: Of activation checkpointing, "none" for none.
        keeps_rng_state: Whether it draws the same masks again.
    """
    if base and not checkpoint.initial_load_model_only:
        yield (
            "checkpoint.initial_load_model_only = false: the base's optimizer state does not fit the adapters. "
            "Leave it at true; a LoRA run resumes from its own checkpoint folder."
        )
    if lora.dropout > 0 and mode in ("full", "selective") and not keeps_rng_state:
        yield (
            f"lora.dropout = {lora.dropout:g} with activation_checkpoint.mode = {mode!r} and "
            "activation_checkpoint.preserve_rng_state = false: what is recomputed would draw other masks than the "
            "forward had. Set preserve_rng_state = true."
        )
    if unknown := [name for name in checkpoint.exclude_from_loading if name and name not in PARTS]:
        yield (
            f"checkpoint.exclude_from_loading: {', '.join(map(repr, unknown))} is no part of a checkpoint; the parts "
            f"are {', '.join(PARTS)}."
        )


def wrong_results(checkpoint: Any, lora: RunConfig, base: Base | None) -> Iterator[str]:
    """What is to be written at the end and cannot be."""
    if lora.save_merged and not (checkpoint.last_save_in_hf and checkpoint.initial_load_in_hf):
        yield (
            "lora.save_merged = true merges the last step's PEFT directory into a Hugging Face base: set "
            "checkpoint.last_save_in_hf = true and checkpoint.initial_load_in_hf = true."
        )
    if lora.save_merged and checkpoint.initial_load_in_hf_quantized:
        yield (
            "lora.save_merged = true with checkpoint.initial_load_in_hf_quantized = true: quantized weights cannot be "
            "merged into. Leave save_merged at false and merge into an unquantized copy with `lora-converter merge`."
        )
    if checkpoint.last_save_in_hf and base is None:
        yield (
            "checkpoint.last_save_in_hf = true: the adapter would be written without its base, which has no source and "
            "is stored nowhere else. Set checkpoint.initial_load_path, or leave it at false."
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        yield (
            "checkpoint.last_save_in_hf = true makes the last step a PEFT directory, which cannot hold the optimizer: "
            "set checkpoint.last_save_model_only = true."
        )


def refuse_first(problems: Iterator[str]) -> None:
    """Raises a ValueError of the first, if there is one."""
    for problem in problems:
        raise ValueError(problem)


def shared_options(sections: Mapping[str, Any], of_the_machine: tuple[str, ...]) -> dict[str, Any]:
    """The options that must be the same on all ranks, by the names that they have on the command line.

    Args:
        sections: A job config as plain tables.
        of_the_machine: How names begin of what may differ, but for how often metrics are reduced over ranks.
    """
    options: dict[str, Any] = {}
    for name, section in sections.items():
        table = {f"{name}.{option}": value for option, value in section.items()} if isinstance(section, dict) else {}
        options |= table or {name: section}
    same = {n: v for n, v in options.items() if n == "metrics.log_freq" or not n.startswith(of_the_machine)}
    return {n: as_written(v) if " at 0x" in str(v) else v for n, v in same.items()}


def refuse_other_class(config: Any, *known: type, instead: type) -> None:
    """Refuses a config whose class is a user's own: what that builds would be left out without a word.

    Args:
        known: The host's classes, whose settings ours take over.
        instead: Ours, which has adapters.

    Raises:
        ValueError: It is none of `known`.
    """
    if type(config) not in known:
        raise ValueError(f"{type(config).__qualname__} knows no adapters. Derive it from {instead.__qualname__}.")
