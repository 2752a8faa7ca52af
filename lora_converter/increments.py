"""What adapters' tensors add to the weights of a plain model: which weight gets which s · L Rᵀ, or why none does."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from lora_converter.experts import factors_by_weight
from lora_converter.linear import LoRALinear, is_transposed, linears_of
from lora_converter.names import owners
from lora_converter.offset import OffsetLinear, plain_factors
from lora_converter.updates import weight_sides

Tensor = torch.Tensor


@dataclass(frozen=True)
class Increment:
    """What is added to one weight: s · L Rᵀ, whole, see `low_rank_updates`."""

    left: Tensor
    right: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return (*self.left.shape[:-1], self.right.shape[-2])


def increments_of(
    tensors: Mapping[str, Tensor], scalings: Mapping[str, float], model: nn.Module
) -> dict[str, Increment]:
    """Weight of a plain model -> its increment.

    Args:
        tensors: Those of adapters, by their names in the trained model.
        scalings: FQN of each adapted module -> factor of its B A.

    Raises:
        ValueError: A module's tensors are no increments of weights, or the model has no such weights, or others.
    """
    found: dict[str, Increment] = {}
    linears, weights = linears_of(model), dict(owners(model))
    if in_full := [name for name in tensors if not any(name.startswith(f"{fqn}.") for fqn in scalings)]:
        raise ValueError(
            f"{', '.join(in_full)} trained in full, which is no increment of a weight. Send such packages to an "
            "AdapterReceiver, whose model has the same train_also."
        )
    for fqn, scaling in scalings.items():
        own = {name.removeprefix(f"{fqn}."): value for name, value in tensors.items() if name.startswith(f"{fqn}.")}
        transposed = fqn in linears and is_transposed(linears[fqn])
        sides = _sides(own, transposed=transposed)
        if not sides:
            raise ValueError(f"{fqn} is adapted by {', '.join(sorted(own))}, which is no increment of a weight.")
        for weight, (left, right) in sides.items():
            found[f"{fqn}.{weight}"] = Increment(left, right, scaling)
            is_there = fqn in linears or left.ndim == 3
            _check(f"{fqn}.{weight}", found[f"{fqn}.{weight}"], weights.get(f"{fqn}.{weight}") if is_there else None)
    return found


def _sides(own: Mapping[str, Tensor], *, transposed: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight below a module -> L and R; empty if the module's tensors, by name, are no increments."""
    a_name, b_name = LoRALinear.adapter_parameter_names
    if own.keys() == {*OffsetLinear.adapter_parameter_names}:
        a, b = plain_factors(*(own[name] for name in OffsetLinear.adapter_parameter_names))
        own = {a_name: a, b_name: b}
    if own.keys() == {a_name, b_name}:
        sides, dims = {"weight": weight_sides(own[a_name], own[b_name], transposed=transposed)}, 2
    else:
        sides, dims = {weight: (own[b], own[a]) for weight, (a, b) in factors_by_weight(own).items()}, 3
    fit = all(
        left.ndim == right.ndim == dims and left.shape[-1] == right.shape[-1] and left.shape[:-2] == right.shape[:-2]
        for left, right in sides.values()
    )
    return sides if fit else {}


def _check(name: str, increment: Increment, weight: Tensor | None) -> None:
    there: object = "no linear of that name" if increment.left.ndim == 2 else "no experts of that name"
    if weight is not None:
        there = tuple(weight.shape) if weight.is_floating_point() else f"quantized ({weight.dtype})"
    if there != increment.shape:
        raise ValueError(f"{name} is {increment.shape} in the package and {there} in the model.")
