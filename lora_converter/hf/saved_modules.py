"""What PEFT calls `modules_to_save`: modules trained in full, whose weights stand beside the factors under their names.

    base_model.model.model.norm.weight      of the module model.norm

PEFT takes each entry for the end of a module's name: 'norm' means every module whose name ends so, 'input_layernorm'
too. What is written are whole names, which mean one module.
"""

import logging
from collections.abc import Iterable, Mapping, MutableMapping

import torch

from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.probes import ask

logger = logging.getLogger(__name__)

_NOT_IN_VLLM = (
    "LoRA: the directory has modules_to_save (%s), and vLLM 0.33 takes no such adapter: `lora-converter merge` makes a "
    "model that goes everywhere."
)


def is_saved(key: str, modules: Iterable[str]) -> bool:
    """Whether a key, `model.norm.weight`, is a parameter of a module that `modules_to_save` means."""
    owner = key.rpartition(".")[0]
    return any(owner.endswith(module) for module in modules)


def is_same_weight(copy: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether two weights are equal, in the less precise dtype of the two."""
    dtype = min((copy.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
    return copy.shape == weight.shape and torch.equal(copy.to(dtype), weight.to(dtype))


def modules_of_keys(keys: Iterable[str]) -> list[str]:
    """The modules that own parameters of these keys, sorted."""
    return sorted({key.rpartition(".")[0] for key in keys})


def to_hf_keys(adapter: StateDictAdapter, weights: MutableMapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights in the host's names -> in Hugging Face's. They are taken out of `weights`."""
    found: dict[str, torch.Tensor] = {}
    for name in list(weights):
        found |= adapter.to_hf({name: weights.pop(name)})
    if found:
        logger.warning(_NOT_IN_VLLM, ", ".join(modules_of_keys(found)))
    return found


def without_keys(adapter: StateDictAdapter, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The weights, by the host's name, that have no key in Hugging Face's model."""
    nameless = []
    for name, shape in shapes.items():
        try:
            found = ask(adapter, {name: torch.empty(shape, device="meta")}, name)
        except ValueError:
            found = {}
        nameless += [] if found else [name]
    return nameless
