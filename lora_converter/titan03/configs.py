"""Jobs with adapters on torchtitan 0.3's own models: for its `llama3_8b` a `llama3_8b_lora`, and so on.

    torchrun ... -m torchtitan.train --module lora_converter.titan03.configs --config llama3_8b_lora \
        --lora.rank 8 --hf_assets_path ./assets/hf/Llama-3.1-8B
"""

import functools
import importlib
import re
from typing import Any

from lora_converter.titan03.trainer import lora

_JOBS = re.compile(r"(llama3|qwen3|deepseek_v3)_(debugmodel|moe_debug|[\d_]+b(_a\d+b)?)")


def _with_adapters(make: Any) -> Any:
    config = make()
    config.checkpoint.enable, config.checkpoint.initial_load_in_hf = True, "debug" not in config.model_spec.flavor
    return lora(config)


for _model in ("llama3", "qwen3", "deepseek_v3"):
    for _name, _make in vars(importlib.import_module(f"torchtitan.models.{_model}.config_registry")).items():
        if _JOBS.fullmatch(_name):
            globals()[f"{_name}_lora"] = functools.partial(_with_adapters, _make)
