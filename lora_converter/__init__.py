"""LoRA for PyTorch-native distributed training: a torchtitan model converter and the library below it.

Importing this package does not import torchtitan; `lora_converter.titan` does.
"""

from lora_converter.adapted import adapter_parameters
from lora_converter.adapters import ParameterCount, apply_lora, count_parameters, freeze_base, reset_adapters
from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear
from lora_converter.state_dict import (
    adapter_configs,
    adapter_state_dict,
    load_adapter_state_dict,
    set_adapter,
    split_state_dict,
)
from lora_converter.switching import (
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    unload_adapter,
    unmerge_adapter,
)

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "ParameterCount",
    "adapter_configs",
    "adapter_parameters",
    "adapter_state_dict",
    "apply_lora",
    "count_parameters",
    "disable_adapter",
    "freeze_base",
    "load_adapter_state_dict",
    "merge_adapter",
    "merge_and_unload",
    "reset_adapters",
    "set_adapter",
    "split_state_dict",
    "unload_adapter",
    "unmerge_adapter",
]
