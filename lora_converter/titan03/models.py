"""torchtitan 0.3's models by the names that 0.2.2 has for them, with and without a job."""

import importlib
import re

import torch
from torchtitan.models import _supported_models
from torchtitan.protocols.model_spec import ModelSpec

from lora_converter.run.host import HostModel
from lora_converter.titan03.experts import EXPERT_CLASSES
from lora_converter.titan03.model import unfuse_qkv
from lora_converter.titan03.names import canonical_name

_FLAVOR = re.compile(r"(.*?)(?:_(flex|varlen)(?:_attn)?)?")


def spec_of(model: str, flavor: str, custom_import: str = "") -> ModelSpec:
    """torchtitan's model of a flavor; 0.2.2's "8B_flex" is "8B" with FlexAttention.

    Args:
        custom_import: A module of the user's with a `model_registry` of its own.

    Raises:
        ValueError: There is no such model or flavor; the message lists those that there are.
    """
    if not custom_import and model not in _supported_models:
        raise ValueError(f"model.name = {model!r}: torchtitan 0.3 has {', '.join(sorted(_supported_models))}.")
    module = importlib.import_module(custom_import or f"torchtitan.models.{model}")
    if not hasattr(module, "model_registry"):
        raise ValueError(f"{module.__name__} has no model_registry(flavor), which torchtitan 0.3 asks for a model.")
    plain, attention = _FLAVOR.fullmatch(flavor).groups()  # type: ignore[union-attr]  # it matches anything
    flavors = next((table for name, table in vars(module).items() if name.endswith("_configs")), [plain])
    if plain not in flavors:
        raise ValueError(f"model.flavor = {flavor!r}: torchtitan 0.3's {model} has {', '.join(flavors)}.")
    return module.model_registry(plain, **({"attn_backend": attention} if attention else {}))


def model_on_meta(model: str, flavor: str, custom_import: str = "") -> HostModel:
    """See `run.host.ModelSource`."""
    spec = spec_of(model, flavor, custom_import)
    if spec.state_dict_adapter is None:
        raise ValueError(f"{model} has no StateDictAdapter to name Hugging Face's modules by.")
    unfuse_qkv(spec.model)
    with torch.device("meta"):
        return HostModel(spec.model.build(), spec.state_dict_adapter(spec.model, None), EXPERT_CLASSES, canonical_name)
