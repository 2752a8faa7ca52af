"""The adapters of a live model as a PEFT directory and back, for models whose module names are Hugging Face's.

    save_peft(from_model(model), "my_adapter")
    into_model(load_peft("my_adapter"), model)

A torchtitan model has names of its own: its trainer writes and reads the directories (`run/peft_io.py`). What such a
directory holds and what is refused stands in `hf/peft_directory.py` and `hf/peft_config.py`.
"""

import math

import torch.nn as nn

from lora_converter.adapted import adapted_modules, check_peft_forms
from lora_converter.hf.peft_config import CONFIG_FILE, PEFT_VERSION, WEIGHTS_FILE
from lora_converter.hf.peft_directory import PeftAdapter, is_peft_directory, load_peft, save_peft, update_peft
from lora_converter.linear import LoRALinear
from lora_converter.state_dict import adapter_configs, adapter_state_dict, load_adapter_state_dict

__all__ = [
    "CONFIG_FILE",
    "PEFT_VERSION",
    "WEIGHTS_FILE",
    "PeftAdapter",
    "from_model",
    "into_model",
    "is_peft_directory",
    "load_peft",
    "save_peft",
    "update_peft",
]


def from_model(model: nn.Module, *, base_model: str = "") -> PeftAdapter:
    """The adapters of a model whose module names are Hugging Face's, such as one of transformers', for `save_peft`.

    A collective on sharded models.

    Raises:
        ValueError: The model has no adapters, some that PEFT cannot express, or some on `nn.Linear` and some on
            `Conv1D`.
    """
    adapted = list(adapted_modules(model))
    check_peft_forms(adapted)
    state, configs = adapter_state_dict(model), adapter_configs(model)
    transposed = {linear.lora_transposed for linear in adapted if isinstance(linear, LoRALinear)}
    if len(transposed) > 1:
        raise ValueError("The model has adapters on nn.Linear and on Conv1D; PEFT's fan_in_fan_out is one for all.")
    config = next(iter(configs.values()))
    return PeftAdapter(
        factors={fqn: (state[a], state[b]) for fqn, (a, b) in sorted(_peft_names(model).items())},
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted(configs),
        base_model=base_model,
        fan_in_fan_out=transposed.pop(),
    )


def into_model(adapter: PeftAdapter, model: nn.Module) -> None:
    """Copies an adapter into the adapters of a model whose module names are Hugging Face's. All ranks.

    Raises:
        ValueError: Names, shapes or the scaling do not fit; nothing is written.
    """
    for fqn, config in adapter_configs(model).items():
        if not math.isclose(config.scaling, adapter.scaling):
            raise ValueError(
                f"The adapter's scaling is {adapter.scaling:g}, that of {fqn} {config.scaling:g}: give apply_lora "
                f"rank = {adapter.rank}, alpha = {adapter.alpha:g}, use_rslora = {adapter.use_rslora}."
            )
    a, b = LoRALinear.adapter_parameter_names
    names = {module: (f"{module}.{a}", f"{module}.{b}") for module in adapter.factors} | _peft_names(model)
    state = {n: f for module, pair in adapter.factors.items() for n, f in zip(names[module], pair, strict=True)}
    load_adapter_state_dict(model, state)


def _peft_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """PEFT's module -> the adapter parameters that are its lora_A and lora_B."""
    return {
        weight.removesuffix(".weight"): names
        for module in adapted_modules(model)
        for weight, names in module.peft_names().items()
    }
