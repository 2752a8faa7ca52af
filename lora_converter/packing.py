"""A whole model with packed weights: which of them are, and what that takes of memory.

Packed are the frozen weights that most of a model is made of: those of linears, adapted or not, and of routed experts.
Embeddings, norms, router gates and the output head stay as they are, and so does a weight whose columns are no whole
number of blocks.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from lora_converter.experts import ExpertClasses, experts_of, pack_experts
from lora_converter.linear import linears_of
from lora_converter.names import plain_modules, plain_parameters
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import pack_linear
from lora_converter.swap import check_forward_is_called, uncalled_linears
from lora_converter.targets import ALL_LINEAR, matches
from lora_converter.tensors import local_part, with_local


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
        if type(linear).forward is not nn.Linear.forward:
            raise ValueError(
                f"{fqn} cannot be packed: its class, {type(linear).__name__}, has a product of its own. Leave out "
                "lora.base_format, or the converter that made it."
            )
    for fqn, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        pack_linear(linear, form=packed[f"{fqn}.weight"], fqn=fqn)
    for fqn, (module, kind) in experts.items():
        if form := packed.get(f"{fqn}.{kind.expert_weights[0]}"):
            pack_experts(module, kind, form=form)
    saved = sum(
        2 * math.prod(shapes[name]) - math.prod(FORMATS[form].packed_shape(shapes[name]))
        for name, form in packed.items()
    )
    return Packing(packed, left, saved)


def packed_weights(model: nn.Module) -> dict[str, tuple[torch.Tensor, str]]:
    """Plain name of each packed weight of a model -> (the parameter, its format)."""
    forms = {id(module.get_parameter(name)): form for module, name, form in _owners(model)}
    return {name: (param, forms[id(param)]) for name, param in plain_parameters(model) if id(param) in forms}


@contextmanager
def packed_weights_hidden(model: nn.Module) -> Iterator[None]:
    """Has weights without data in the place of packed ones, for whoever initialises all that a model has."""
    owners = list(_owners(model))
    packed = [module.get_parameter(name) for module, name, _ in owners]
    for (module, name, form), param in zip(owners, packed, strict=True):
        _replace(module, name, torch.empty(FORMATS[form].weight_shape(param.shape), device="meta"))
    try:
        yield
    finally:
        for (module, name, _), param in zip(owners, packed, strict=True):
            module._parameters[name] = param


@contextmanager
def packed_weights_as_floats(model: nn.Module) -> Iterator[None]:
    """Has the same bytes as float8 in the place of packed weights, for whoever makes new parameters of a model's.

    Parameters are trainable unless one says otherwise, and torch makes none of integers.
    """
    owners = list(_owners(model))
    for module, name, _ in owners:
        _replace(module, name, _viewed(module.get_parameter(name), torch.float8_e4m3fn))
    try:
        yield
    finally:
        for module, name, _ in owners:
            _replace(module, name, _viewed(module.get_parameter(name), torch.uint8))


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Of each packed weight the module, its name there, and its format."""
    for _, module in plain_modules(model):
        for name, param in module.named_parameters(recurse=False):
            if param.dtype is torch.uint8 and (form := vars(module).get("packed_format")):
                yield module, name, form


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Not by the module's own `register_parameter`, which does more than that."""
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _viewed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    own = local_part(value.detach()).view(dtype)
    return with_local(own, value, value.shape) if isinstance(value, DTensor) else own
