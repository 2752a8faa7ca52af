"""torchtitan 0.3.0 as a host: configs that build models with adapters, and the trainer that trains them.

    from lora_converter.titan03 import lora

    def llama3_8b_lora():
        config = lora(llama3_8b(), rank=16, alpha=32.0)     # --lora.* on the command line
        config.checkpoint.initial_load_in_hf = True
        return config

Names are looked up lazily, so that CPU ranks can be chosen before torchtitan is first imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_converter.titan03.trainer import lora

__all__ = ["lora"]


def __getattr__(name: str) -> Any:
    if name == "lora":
        from lora_converter.titan03.trainer import lora

        return lora
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
