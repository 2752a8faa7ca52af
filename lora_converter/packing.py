"""A whole model with packed weights: which of them are, and what that takes of memory.

Packed are the frozen weights that most of a model is made of: those of linears, adapted or not, and of routed experts.
Embeddings, norms, router gates and the output head stay as they are, and so does a weight whose columns are no whole
number of blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.nn as nn

from lora_converter.experts import ExpertClasses, experts_of, pack_experts
from lora_converter.linear import linears_of
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import pack_linear, what_keeps_from_packing
from lora_converter.swap import check_forward_is_called, uncalled_linears
from lora_converter.targets import ALL_LINEAR, matches


@dataclass(frozen=True)
class Packing:
    """What `pack_model` has done.

    Attributes:
        packed: Plain name of each packed weight -> its format.
        left: Weights that stay as they are, since their columns are no whole number of blocks, or those of their
            experts' other weights -> their columns.
        saved: Bytes less than in bf16, of the whole model.
    """

    packed: dict[str, str]
    left: dict[str, int]
    saved: int


def packable(model: nn.Module, expert_classes: ExpertClasses = MappingProxyType({})) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of the weights that can be packed: of linears but heads and gates, and of routed experts."""
    uncalled = uncalled_linears(model)
    found = {
        f"{fqn}.weight": tuple(module.get_parameter("weight").shape)
        for fqn, module in linears_of(model).items()
        if matches(ALL_LINEAR, fqn) and fqn not in uncalled
    }
    for fqn, (module, kind) in experts_of(model, expert_classes).items():
        found |= {f"{fqn}.{name}": tuple(module.get_parameter(name).shape) for name in kind.expert_weights}
    return found


def pack_model(
    model: nn.Module, formats: Mapping[str, str], *, expert_classes: ExpertClasses = MappingProxyType({})
) -> Packing:
    """Packs weights of a model without adapters, in place; on the meta device they get their shapes alone.

    Args:
        formats: Name of a weight, of those that `packable` found -> its format. An experts module has one format.
        expert_classes: The host's classes of modules that hold routed experts.

    Raises:
        ValueError: A linear has a product of its own, or is never reached through its class. The model is then as it
            was.
    """
    shapes, experts = packable(model, expert_classes), experts_of(model, expert_classes)
    left = {name: shapes[name][-1] for name, form in formats.items() if not FORMATS[form].fits(shapes[name][-1])}
    packed = {name: form for name, form in formats.items() if name not in left}
    for fqn, (_, kind) in experts.items():
        own = [f"{fqn}.{weight}" for weight in kind.expert_weights]
        if len({packed.get(name) for name in own}) > 1:  # all of them in one format, or none
            left |= {name: shapes[name][-1] for name in own if packed.pop(name, "")}
    linears = {fqn: linear for fqn, linear in linears_of(model).items() if f"{fqn}.weight" in packed}
    for fqn, linear in linears.items():
        check_forward_is_called(fqn, linear)
        if obstacle := what_keeps_from_packing(linear):
            raise ValueError(
                f"{fqn} cannot be packed: {obstacle}. Leave out lora.base_format, or the converter that made it."
            )
    for fqn, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        pack_linear(linear, form=packed[f"{fqn}.weight"], fqn=fqn)
    for fqn, (module, kind) in experts.items():
        if form := packed.get(f"{fqn}.{kind.expert_weights[0]}"):
            pack_experts(module, kind, form=form, fqn=fqn)
    saved = sum(
        2 * math.prod(shapes[name]) - math.prod(FORMATS[form].packed_shape(shapes[name]))
        for name, form in packed.items()
    )
    return Packing(packed, left, saved)
