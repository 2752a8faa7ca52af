"""LoRA for PyTorch-native distributed training: a torchtitan model converter and the library below it.

Importing this package does not import torchtitan; `lora_converter.titan` does.
"""

from lora_converter.apply import (
    ParameterCount,
    adapter_parameters,
    apply_lora,
    count_parameters,
    freeze_base,
    merge_adapter,
    reset_adapters,
    unmerge_adapter,
)
from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "ParameterCount",
    "adapter_parameters",
    "apply_lora",
    "count_parameters",
    "freeze_base",
    "merge_adapter",
    "reset_adapters",
    "unmerge_adapter",
]
