"""Routed experts with a low-rank adapter each, made by swapping the class of the module that holds them.

    y_e = x_e W_eᵀ + s · (x_e A_e) B_eᵀ        per expert e and product;  W frozen

The weights of all experts of a layer are one parameter per product, W (experts, out_features, in_features). So are the
factors: `<weight>_lora_a` (experts, in_features, rank) and `<weight>_lora_b` (experts, out_features, rank). Here is
what is the same on every host. A host's class derives from `LoRAExperts` and from its `RoutedExperts`, which says what
the weights are called and has the forward (`packed_experts.py`).

Under expert parallelism factors are sharded as the weights are, by expert. Under tensor parallelism a factor is sharded
along the features that it shares with its weight, as beside a linear (`tensor_parallel.py`):

    weight column-wise   Shard(1)   A Replicate   B Shard(1)
    weight row-wise      Shard(2)   A Shard(1)    B Replicate

No activation needs a collective for it, and the gradient of a whole factor is a partial sum.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lora_converter.adapted import AdaptedModule, adapt
from lora_converter.config import LoRAConfig
from lora_converter.grouped import grouped_linear
from lora_converter.names import plain_modules, stable_hash
from lora_converter.ops import low_rank_linear
from lora_converter.packed_experts import RoutedExperts
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_ops import packed_linear
from lora_converter.swap import check_forward_is_called, follow_hook, swap_class, unswapped
from lora_converter.tensor_parallel import place_beside, whole_beside
from lora_converter.tensors import local_indices, local_part
from lora_converter.updates import low_rank_updates

Tensor = torch.Tensor
E = TypeVar("E", bound="LoRAExperts")


class LoRAExperts(AdaptedModule, RoutedExperts):
    """What a module of routed experts gains: a trained low-rank update per expert. A host derives from it."""

    adapter_kind = "experts modules"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.peft_factors = {weight: _factor_names(weight) for weight in cls.expert_weights}
        cls.adapter_parameter_names = tuple(name for pair in cls.peft_factors.values() for name in pair)
        cls.zero_at_start = tuple(b for _, b in cls.peft_factors.values())

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in self.adapter_parameter_names if name in self._parameters}

    def peft_names(self) -> dict[str, tuple[str, str]]:
        own = self.merged_names()
        return {weight: names for weight, names in super().peft_names().items() if weight.rpartition(".")[2] in own}

    def merged_names(self) -> list[str]:
        return [weight for weight in self.expert_weights if _factor_names(weight)[0] in self._parameters]

    @property
    def is_computed_here(self) -> bool:
        return self.is_active or super().is_computed_here

    def per_expert(self, weight: str) -> Callable[[int, Tensor], Tensor]:
        if not self._updates(weight):
            return super().per_expert(weight)
        # Unbound, since the gradients of slices would be added up over the whole factor, expert by expert.
        weights, form = local_part(self.get_parameter(weight)).unbind(), self.packed_format
        a, b = (factor.unbind() for factor in self._local_factors(weight))
        scaling = self.lora_config.scaling
        if form:
            return lambda e, x: packed_linear(x, weights[e], form=form, factors=(a[e].t(), b[e]), scaling=scaling)
        return lambda e, x: low_rank_linear(x, weights[e], None, a[e].t(), b[e], scaling=scaling)

    def grouped_product(self, weight: str, x: Tensor, offsets: Tensor) -> Tensor:
        if not self._updates(weight):
            return super().grouped_product(weight, x, offsets)
        base, factors = self.base_beside(weight, x), self._local_factors(weight)
        scaling = self.lora_config.scaling
        return grouped_linear(x, base, *factors, offsets, scaling=scaling, form=self.packed_format)

    def _updates(self, weight: str) -> bool:
        return self.is_active and weight in self.merged_names()

    def _factors(self, weight: str) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = _factor_names(weight)
        return self.get_parameter(a), self.get_parameter(b)

    def _local_factors(self, weight: str) -> tuple[Tensor, Tensor]:
        a, b = self._factors(weight)
        return local_part(a), local_part(b)

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        """A as a linear's, uniform in ±1/√in_features, of each expert by itself; B zero.

        An expert's values follow from the seed, the canonical name and the expert's number. A rank draws those of the
        experts that it holds, on the CPU in fp32 and whole, and keeps its slice.
        """
        for weight in self.merged_names():
            a, b = self._factors(weight)
            _, in_features, rank = a.shape
            bound, features, own = 1 / math.sqrt(in_features), local_indices(a, 1), local_part(a)
            for row, expert in enumerate(local_indices(a, 0).tolist()):
                name = f"{seed}:{self.canonical_weight_name(weight)}:{expert}"
                generator = torch.Generator().manual_seed(stable_hash(name))
                values = torch.empty(in_features, rank).uniform_(-bound, bound, generator=generator)
                own[row].copy_(values[features])
            b.zero_()

    def canonical_weight_name(self, weight: str) -> str:
        """A weight's name on any host."""
        return f"{self.lora_canonical_name}.{weight}"

    def local_updates(self, weight: str) -> Iterator[Tensor]:
        """s · B_e A_eᵀ, (1, out_features, in_features), of one expert of this rank after the other."""
        a, b = self._factors(weight)
        return low_rank_updates(b, a, self.get_parameter(weight), scaling=self.lora_config.scaling)

    def whole_over(self) -> dict[str, DeviceMesh]:
        found: dict[str, DeviceMesh] = {}
        for weight in self.merged_names():
            for name in _factor_names(weight):
                mesh = whole_beside(self.get_parameter(name), self.get_parameter(weight))
                found |= {name: mesh} if mesh is not None else {}
        return found

    def remove_adapter(self) -> None:
        for name in self.adapter_parameters():
            delattr(self, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `PackedModule`'s. Where a weight is sharded, its factors go with it: plans for the weights know none."""
        super().register_parameter(name, param)
        if name in self.expert_weights and isinstance(param, DTensor) and name in self.merged_names():
            for factor, shared_dim in zip(_factor_names(name), (2, 1), strict=True):
                placed = place_beside(self.get_parameter(factor), param, shared_dim=shared_dim)
                super().register_parameter(factor, placed)

    def extra_repr(self) -> str:
        own = f"rank={self.lora_config.rank}, alpha={self.lora_config.alpha} on {', '.join(self.merged_names())}"
        return ", ".join(filter(None, [super().extra_repr(), own]))


def _factor_names(weight: str) -> tuple[str, str]:
    return f"{weight}_lora_a", f"{weight}_lora_b"


def factors_by_weight(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Weight -> its A and B, of the names of an adapter's parameters; empty if there are others among them."""
    found = {name.removesuffix(end) for name in names for end in _factor_names("") if name.endswith(end)}
    pairs = {weight: _factor_names(weight) for weight in sorted(found)}
    return pairs if set(names) == {name for pair in pairs.values() for name in pair} else {}


ExpertClasses = Mapping[type[nn.Module], type[LoRAExperts]]
"""A host's classes of experts modules -> the kinds that adapt them."""


def add_expert_adapters(
    experts: nn.Module,
    kind: type[E],
    config: LoRAConfig,
    *,
    weights: list[str],
    fqn: str,
    canonical_name: str = "",
    dtype: torch.dtype | None = None,
) -> E:
    """Turns `experts` into a module of `kind` in place; its parameters are not touched. The adapter is left unset.

    Args:
        weights: Those of `kind.expert_weights` that get factors.
        fqn: Its name in the whole model.
        canonical_name: Its name on any host; `fqn` if left out.
        dtype: Dtype of the factors; fp32 if left out, or the weights' if that is wider.
    """
    adapted = adapt(experts, kind, config, fqn=fqn, canonical_name=canonical_name)
    for weight in weights:
        base = adapted.get_parameter(weight)
        count, out_features, in_features = adapted.weight_shape(weight)
        for name, features in zip(_factor_names(weight), (in_features, out_features), strict=True):
            kept = dtype or torch.promote_types(base.dtype, torch.float32)
            factor = torch.empty(count, features, config.rank, device=base.device, dtype=kept)
            adapted.register_parameter(name, nn.Parameter(factor))
    return adapted


def experts_of(model: nn.Module, classes: ExpertClasses) -> dict[str, tuple[nn.Module, type[LoRAExperts]]]:
    """Plain name -> the experts modules of a model, packed or not, each with the kind that adapts it."""
    found = ((fqn, module, classes.get(unswapped(type(module)))) for fqn, module in plain_modules(model))
    return {fqn: (module, kind) for fqn, module, kind in found if kind is not None}


def expert_shapes(
    model: nn.Module, classes: ExpertClasses = MappingProxyType({})
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Plain name of an experts module -> its weights that can be adapted -> (experts, out_features, in_features).

    Args:
        classes: Those of plain modules; packed ones, and those that have adapters, are found without.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for fqn, module in plain_modules(model):
        if isinstance(module, RoutedExperts):
            found[fqn] = {weight: module.weight_shape(weight) for weight in module.expert_weights}
        elif kind := classes.get(type(module)):
            found[fqn] = {weight: tuple(module.get_parameter(weight).shape) for weight in kind.expert_weights}
    return found


def pack_experts(experts: nn.Module, kind: type[LoRAExperts], *, form: str, fqn: str = "experts") -> RoutedExperts:
    """Packs the weights of an experts module and turns it into one that computes with them, in place.

    They are frozen from then on. An adapter goes on top as on any experts module.

    Args:
        experts: Without adapters, on any device; on meta weights get their shapes alone.
        kind: The one that adapts it.
        form: The name of a packed format.
        fqn: Its name in the whole model.

    Raises:
        ValueError: See `PackedFormat.pack` and `check_forward_is_called`. The module is then as it was.
    """
    assert not isinstance(experts, RoutedExperts)
    check_forward_is_called(fqn, experts)
    values = {name: FORMATS[form].pack(experts.get_parameter(name).detach()) for name in kind.expert_weights}
    packed = swap_class(experts, _without_adapter(kind))
    follow_hook(packed)
    packed.packed_format, packed.packed_fqn = form, fqn
    for name, value in values.items():
        packed.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return packed


def _without_adapter(kind: type[LoRAExperts]) -> type[RoutedExperts]:
    """The host's class of experts that `kind` adds adapters to."""
    return next(c for c in kind.mro() if issubclass(c, RoutedExperts) and not issubclass(c, AdaptedModule))
