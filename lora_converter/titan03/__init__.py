"""torchtitan 0.3.0 as a host: configs that build models with adapters, and the trainer that trains them.

from lora_converter.titan03 import lora

def llama3_8b_lora():
    config = lora(llama3_8b(), rank=16, alpha=32.0)     # --lora.* on the command line
    config.checkpoint.initial_load_in_hf = True
    return config
"""

from lora_converter.titan03.trainer import lora

__all__ = ["lora"]
