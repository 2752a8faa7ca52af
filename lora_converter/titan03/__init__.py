"""torchtitan 0.3.0 as a host: configs that build models with adapters, and the trainer that trains them.

    from lora_converter.titan03 import chat, lora

    def llama3_8b_lora():
        config = lora(llama3_8b(), rank=16, alpha=32.0)     # --lora.* on the command line
        config.checkpoint.initial_load_in_hf = True
        return chat(config, "conversations.jsonl")          # --chat.* on the command line

Names are looked up lazily, so that CPU ranks can be chosen before torchtitan is first imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_converter.titan03.trainer import chat, lora

__all__ = ["chat", "lora"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lora_converter.titan03.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
