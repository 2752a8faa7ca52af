"""A linear with a low-rank adapter, made by swapping the class of the linear that is there.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        W, b frozen;  A = lora_a.weight, B = lora_b.weight

The module keeps its identity, its parameters and its names: base checkpoints, tensor-parallel plans,
activation-checkpointing filters and other converters see the linear they knew. Its class becomes a subclass of
whatever linear it already is (`nn.Linear`, `Float8Linear`, ...), whose forward still computes x Wᵀ + b.

`lora_a` and `lora_b` are child linears that are never quantized. Not here: the arithmetic (`ops.py`), how adapters are
chosen (`targets.py`), how they are sharded (`tensor_parallel.py`).
"""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lora_converter.adapted import AdaptedModule, adapt
from lora_converter.config import LoRAConfig
from lora_converter.names import plain_modules, stable_hash
from lora_converter.ops import low_rank_linear, low_rank_update
from lora_converter.packed_ops import packed_linear
from lora_converter.tensor_parallel import LoRAFactor, local_bias, local_input, local_output, shard_of_features
from lora_converter.tensors import copy_full_, local_part
from lora_converter.updates import low_rank_updates, weight_sides


class LoRALinear(AdaptedModule):
    """What a linear's class gains: a trained low-rank update beside the frozen weight. Made by `add_adapter` alone.

    Attributes:
        lora_a: A, weight (rank, in_features).
        lora_b: B, weight (out_features, rank).
    """

    adapter_kind = "linears"
    factor_names: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    adapter_parameter_names: ClassVar[tuple[str, ...]] = ("lora_a.weight", "lora_b.weight")
    zero_at_start: ClassVar[tuple[str, ...]] = ("lora_b.weight",)
    peft_factors: ClassVar = {"weight": ("lora_a.weight", "lora_b.weight")}

    in_features: int
    out_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: LoRAFactor
    lora_b: LoRAFactor
    lora_transposed: bool = False
    """The weight is stored as (in_features, out_features), PEFT's `fan_in_fan_out`: transformers' Conv1D."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        if not self.is_active:
            return super().forward(input)
        if self._is_one_operation(input):
            return self._on_this_rank(input, with_base=True)
        # A base with a product of its own: float8; or packed, on all ranks of a mesh.
        return super().forward(input) + self._on_this_rank(input, with_base=False)

    def _is_one_operation(self, x: torch.Tensor) -> bool:
        """Whether base and update are computed together."""
        if self.packed_format:
            return not isinstance(x, DTensor) or (self.lora_a.whole_over or self.lora_b.whole_over) is not None
        # torch.compile follows an attribute of super(), and not a getattr or a cast; what it makes of the comparison
        # (False, torch 2.13) does not matter, since it gets the same operations from both ways.
        return self.lora_transposed or super().forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]

    def _on_this_rank(self, x: torch.Tensor, *, with_base: bool) -> torch.Tensor:
        """Base and update, or the update alone, of this rank's parts of x, W, A and B. No collective."""
        weight = self.weight.t() if self.lora_transposed else self.weight
        mesh, column_wise = self.lora_a.whole_over or self.lora_b.whole_over, self.lora_a.whole_over is not None
        bias, (a, b) = self.bias, self.product_factors(local=mesh is not None)
        if mesh is None:
            return self._linear(x, weight, bias, a, b, with_base=with_base)
        is_placed = isinstance(x, DTensor)  # or the host computes with each rank's part, and knows what it is of
        out = self._linear(
            local_input(x, mesh, column_wise=column_wise) if is_placed else x,
            local_part(weight),
            local_bias(bias, mesh, column_wise=column_wise),
            a,
            b,
            with_base=with_base,
            shards=None if column_wise else mesh,
        )
        return local_output(out, mesh, column_wise=column_wise, out_features=self.out_features) if is_placed else out

    def product_factors(self, *, local: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of what is added; this rank's parts of them if `local`. Along their rank they are whole."""
        a, b = self.lora_a.weight, self.lora_b.weight
        return (local_part(a), local_part(b)) if local else (a, b)

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        with_base: bool,
        shards: DeviceMesh | None = None,
    ) -> torch.Tensor:
        """shards: The mesh over which the features of x are sharded, if they are."""
        scaling, keep, dropout = self.lora_config.scaling, None, self.lora_config.dropout
        if self.training and dropout > 0:
            if isinstance(x, DTensor):
                update = low_rank_update(F.dropout(x, dropout), a, b, scaling=scaling)
                return F.linear(x, weight, bias) + update if with_base else update
            scaling, keep = scaling / (1 - dropout), self._mask(x, shards)
        if with_base and self.packed_format:
            form = self.packed_format
            return packed_linear(x, weight, bias, form=form, factors=(a, b), scaling=scaling, keep=keep)
        if with_base:
            return low_rank_linear(x, weight, bias, a, b, scaling=scaling, keep=keep)
        return low_rank_update(x, a, b, scaling=scaling, keep=keep)

    def _mask(self, x: torch.Tensor, shards: DeviceMesh | None) -> torch.Tensor:
        """Dropout's mask: drawn for all features, as on one rank, of which this rank keeps its own."""
        shape, dropout = (*x.shape[:-1], self.in_features), self.lora_config.dropout
        if torch.compiler.is_compiling():
            # Not filled in place: Inductor's CPU code may run a product before the mask is there (torch 2.13).
            mask = torch.rand(shape, device=x.device) >= dropout
        else:
            mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)  # a byte, no more
        return mask if shards is None else shard_of_features(mask, shards, x.shape[-1])

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        """A as PEFT and torchtune draw it, uniform in ±1/√in_features; B zero, so the update starts at zero.

        A is drawn on the CPU in fp32 over the full shape, and each rank keeps its slice, whatever the placements.
        """
        bound = 1 / math.sqrt(self.in_features)
        generator = torch.Generator().manual_seed(stable_hash(f"{seed}:{self.lora_canonical_name}"))
        full = torch.empty(self.lora_config.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        copy_full_(self.lora_a.weight, full)
        self.lora_b.weight.zero_()

    def merged_names(self) -> list[str]:
        return ["weight"]

    def local_updates(self, weight: str) -> Iterator[torch.Tensor]:
        """s · B A, in one piece."""
        return low_rank_updates(
            *weight_sides(self.lora_a.weight, self.lora_b.weight, transposed=self.lora_transposed),
            self.get_parameter(weight),
            scaling=self.lora_config.scaling,
        )

    def whole_over(self) -> dict[str, DeviceMesh]:
        factors = {"lora_a.weight": self.lora_a, "lora_b.weight": self.lora_b}
        return {name: factor.whole_over for name, factor in factors.items() if factor.whole_over is not None}

    def remove_adapter(self) -> None:
        for name in (*self.factor_names, *(["lora_transposed", "in_features", "out_features"] * self.lora_transposed)):
            delattr(self, name)

    def to_linear(self) -> nn.Linear:
        """What torchao converts a linear with after quantization-aware training: a new one, of the weight alone.

        Raises:
            ValueError: Always, since it would leave the adapter out.
        """
        raise ValueError(
            f"{self.lora_fqn} has an adapter, which a conversion would lose. Take it off with unload_adapter, and put "
            "it on the converted model again, or call merge_and_unload."
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, but leaves the factors' parameters to the factors.

        `ColwiseParallel` offers every parameter below a linear under its dotted name, and the factors' again when
        it visits them.
        """
        if name.removesuffix(".weight") not in self.factor_names:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        config = self.lora_config
        return f"{super().extra_repr()}, rank={config.rank}, alpha={config.alpha}, dropout={config.dropout}"


def is_linear(module: nn.Module) -> bool:
    """Whether a module can get an adapter of this kind."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as (in_features, out_features), whatever a file says of it."""
    return _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """By name, so that transformers, whose GPT-2 alone is made of them, need not be imported."""
    return any(f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).mro())


def add_adapter(
    linear: nn.Module,
    config: LoRAConfig,
    *,
    fqn: str,
    canonical_name: str = "",
    dtype: torch.dtype | None = None,
    factor_class: type[LoRAFactor] = LoRAFactor,
    kind: type[LoRALinear] = LoRALinear,
) -> LoRALinear:
    """Turns `linear` into a `LoRALinear` in place; its parameters are not touched. The adapter is left unset.

    Args:
        linear: Any `nn.Linear`, or transformers' `Conv1D`, on any device, meta included.
        fqn: Its name in the whole model.
        canonical_name: Its name on any host; `fqn` if left out.
        dtype: Dtype of the factors; fp32 if left out, or the weight's if that is wider.
        factor_class: What A and B are made of; a host may need more of them.
        kind: What it becomes, which names its factors of A's and B's shapes in turn.
    """
    transposed = _is_conv1d(linear)
    adapted = adapt(linear, kind, config, fqn=fqn, canonical_name=canonical_name)
    if transposed:
        adapted.lora_transposed = True
        adapted.in_features, adapted.out_features = adapted.weight.shape
    like = torch.empty(
        0, device=adapted.weight.device, dtype=dtype or torch.promote_types(adapted.weight.dtype, torch.float32)
    )
    shapes = ((adapted.in_features, config.rank), (config.rank, adapted.out_features))
    for index, name in enumerate(kind.factor_names):
        setattr(adapted, name, factor_class(*shapes[index % 2], rank_dim=index % 2, like=like))
    return adapted


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> module of all linears of a model but the adapters' own."""
    return {
        fqn: module for fqn, module in plain_modules(model) if is_linear(module) and not isinstance(module, LoRAFactor)
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Plain name -> (out_features, in_features) of all linears of a model but the adapters' own."""
    return {
        fqn: (module.out_features, module.in_features)
        for fqn, module in linears_of(model).items()
        if isinstance(module, nn.Linear)
    }
