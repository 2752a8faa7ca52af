"""`adapter_config.json`: what an adapter's settings may say, read and written. PEFT's words stay here.

Format: PEFT 0.21. PEFT adds fields with every release; some change what the factors mean.
"""

import sys
from pathlib import Path
from typing import Any

from lora_converter.files import REPLACED, read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

PEFT_VERSION = "0.21.2"
"""Of the format that is written."""

_MUST_BE: dict[str, tuple] = {
    "alpha_pattern": (None, {}),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_dora": (False,),
    "use_qalora": (False,),
}
"""Settings of PEFT's that change what an adapter computes or holds, and their values without effect."""


_KINDS: dict[str, tuple[str, Any]] = {
    "base_model_name_or_path": ("a string", str),
    "fan_in_fan_out": ("true or false", bool),
    "lora_dropout": ("a number", int | float),
    "target_modules": ("a string or a list of strings", str | list),
    "use_rslora": ("true or false", bool),
}
"""What else is read of the settings; null, and leaving it out, give its default."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a PEFT directory, every one of a kind and value that is understood.

    Raises:
        ValueError: There is no such file, or a field has a value that is not supported, with both.
    """
    if not folder.is_dir():
        killed = folder.with_name(folder.name + REPLACED)
        hint = f" {killed} is what a writer that was killed left of the last one: rename it back." * killed.is_dir()
        raise ValueError(
            f"{folder} is not a folder. Name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.{hint}"
        )
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_FILE}, so it is no PEFT directory.") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type = {config.get('peft_type')!r}; only 'LORA' is supported.")
    for name, harmless in _MUST_BE.items():
        if name in config and config[name] not in harmless:
            raise ValueError(f"{path}: {name} = {config[name]!r} is not supported; it must be {harmless[0]!r}.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r = {rank!r}; it must be an integer of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
        raise ValueError(f"{path}: lora_alpha = {alpha!r}; it must be a finite number above 0.")
    for name, (allowed, kinds) in _KINDS.items():
        if not isinstance(config.get(name), kinds | None):
            raise ValueError(f"{path}: {name} = {config[name]!r}; it must be {allowed}.")
    if not 0 <= (config.get("lora_dropout") or 0) < 1:
        raise ValueError(f"{path}: lora_dropout = {config['lora_dropout']!r}; it must be at least 0 and below 1.")
    if not all(isinstance(name, str) for name in as_list(config.get("target_modules"))):
        raise ValueError(f"{path}: target_modules = {config['target_modules']!r}; they must be names.")
    return config


def config_of(adapter: Any) -> dict[str, Any]:
    """The settings of a `PeftAdapter` as PEFT has them: every field that a reader may look at, the rest is default."""
    return {
        "base_model_name_or_path": adapter.base_model or None,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": adapter.rank,
        "target_modules": sorted(adapter.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.use_rslora,
    }


def as_list(target_modules: Any) -> list[str]:
    """`target_modules`, which may be one string or left out."""
    return [target_modules] if isinstance(target_modules, str) else list(target_modules or [])
