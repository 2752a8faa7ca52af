"""A linear with a low-rank adapter, made by swapping the class of the linear that is there.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        W, b frozen;  A = lora_a.weight, B = lora_b.weight

The module keeps its identity, its parameters and its names: base checkpoints, tensor-parallel plans,
activation-checkpointing filters and other converters see the linear they knew. Its class becomes a subclass of
whatever linear it already is (`nn.Linear`, `Float8Linear`, ...), whose forward still computes x Wᵀ + b.

`lora_a` and `lora_b` are child linears that are never quantized. Not here: the arithmetic (`ops.py`), how adapters are
chosen (`targets.py`), how they are sharded (from outside; the one rule that belongs to the adapter itself is in
`LoRAFactor`).
"""

import functools
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lora_converter.config import LoRAConfig
from lora_converter.ops import low_rank_linear, low_rank_update


class LoRAFactor(nn.Linear):
    """One factor of the update: A maps in_features to rank, B maps rank to out_features.

    Tensor parallelism reaches a factor through the plan entry of its base linear: `ColwiseParallel` offers it rows,
    `RowwiseParallel` columns. The factor takes the shard only along the features that it shares with the base; its
    rank dim stays whole, so that x Aᵀ needs no collective of its own:

        base column-wise, weight Shard(0):   A Replicate,  B Shard(0)
        base row-wise,    weight Shard(1):   A Shard(1),   B Replicate
    """

    rank_dim: int
    """Tensor dim of `weight` that is the rank: 0 for A, 1 for B."""

    whole_over: DeviceMesh | None = None
    """
    The tensor-parallel mesh over which the factor was kept whole. Each rank's gradient of it is then a partial sum,
    which `gradients.sum_partial_gradients` completes.
    """

    def __init__(self, in_features: int, out_features: int, *, rank_dim: int, like: torch.Tensor):
        super().__init__(in_features, out_features, bias=False, device=like.device, dtype=like.dtype)
        self.rank_dim = rank_dim

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, but a tensor-parallel shard of the rank dim becomes Replicate."""
        if isinstance(param, DTensor) and param.placements == (Shard(self.rank_dim),):
            self.whole_over = param.device_mesh
            whole = distribute_tensor(self.weight.detach(), param.device_mesh, [Replicate()])
            param = nn.Parameter(whole, requires_grad=self.weight.requires_grad)
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Nothing: values come from `LoRALinear.reset_adapter`, and the global generator is left alone."""


class LoRALinear(nn.Module):
    """What a linear's class gains: a trained low-rank update beside the frozen weight. Made by `add_adapter` alone.

    Attributes:
        lora_a: A, weight (rank, in_features).
        lora_b: B, weight (out_features, rank).
        lora_config: The adapter's settings.
        lora_fqn: Name of this linear in the whole model; pipeline stages and wrappers do not change it.
    """

    adapter_parameter_names = ("lora_a.weight", "lora_b.weight")
    """What trains, by declaration: every other parameter below this module belongs to the base."""

    in_features: int
    out_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: LoRAFactor
    lora_b: LoRAFactor
    lora_config: LoRAConfig
    lora_fqn: str
    lora_transposed: bool = False
    """The weight is stored as (in_features, out_features), PEFT's `fan_in_fan_out`: transformers' Conv1D."""

    lora_enabled: bool = True
    """False while `disable_adapter` is entered: the forward is the base's."""

    lora_unmerged: torch.Tensor | None = None
    """The base weight, this rank's part of it, while the update is merged into `weight`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        if self.lora_unmerged is not None or not self.lora_enabled:
            return super().forward(x)
        if self._base_is_plain:
            return self._on_this_rank(x, with_base=True)
        return super().forward(x) + self._on_this_rank(x, with_base=False)  # a base with a product of its own: float8

    @property
    def _base_is_plain(self) -> bool:
        return self.lora_transposed or super().forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]

    def _on_this_rank(self, x: torch.Tensor, *, with_base: bool) -> torch.Tensor:
        """Base and update, or the update alone, on this rank's parts of x, W, A and B, without a collective.

            column-wise base   x Replicate   W Shard(0)  A Replicate  B Shard(0)   -> Shard(-1)
            row-wise base      x Shard(-1)   W Shard(1)  A Shard(1)   B Replicate  -> Partial

        The gradient of x is what the base's own is, Partial and Shard(-1). That of the whole factor is a partial sum,
        see `gradients.py`.
        """
        weight = self.weight.t() if self.lora_transposed else self.weight
        bias, a, b = self.bias, self.lora_a.weight, self.lora_b.weight
        mesh = self.lora_a.whole_over or self.lora_b.whole_over
        if mesh is None:
            return self._linear(x, weight, bias, a, b, with_base=with_base)
        column_wise = self.lora_a.whole_over is not None
        takes, gives = (Replicate(), Shard(x.ndim - 1)) if column_wise else (Shard(x.ndim - 1), Partial())
        local = _local(x, mesh, takes, grad=Partial() if column_wise else takes)
        if not column_wise and mesh.get_local_rank() > 0:
            bias = None  # once in the sum
        shards = None if column_wise else mesh
        out = self._linear(local, *map(_to_local, (weight, bias, a, b)), with_base=with_base, shards=shards)
        return _as_dtensor(out, mesh, gives, (*x.shape[:-1], self.out_features))

    def _linear(self, x, weight, bias, a, b, *, with_base: bool, shards: DeviceMesh | None = None):  # type: ignore[no-untyped-def]
        """shards: The mesh over which the features of x are sharded, if they are."""
        scaling, keep, dropout = self.lora_config.scaling, None, self.lora_config.dropout
        if self.training and dropout > 0:
            if isinstance(x, DTensor):
                update = low_rank_update(F.dropout(x, dropout), a, b, scaling=scaling)
                return F.linear(x, weight, bias) + update if with_base else update
            scaling, keep = scaling / (1 - dropout), self._mask(x, shards)
        if with_base:
            return low_rank_linear(x, weight, bias, a, b, scaling=scaling, keep=keep)
        return low_rank_update(x, a, b, scaling=scaling, keep=keep)

    def _mask(self, x: torch.Tensor, shards: DeviceMesh | None) -> torch.Tensor:
        """Dropout's mask: drawn for all features, as on one rank, of which this rank keeps its own."""
        mask = torch.empty(*x.shape[:-1], self.in_features, dtype=torch.bool, device=x.device)
        mask.bernoulli_(1 - self.lora_config.dropout)
        if shards is None:
            return mask
        start = shards.get_local_rank() * math.ceil(self.in_features / shards.size())
        return mask[..., start : start + x.shape[-1]].contiguous()

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        """A as PEFT and torchtune draw it, uniform in ±1/√in_features; B zero, so the update starts at zero.

        The values depend on `seed` and `lora_fqn` alone: A is drawn on the CPU in fp32 over the full shape, and each
        rank keeps its slice, whatever the placements.
        """
        bound = 1 / math.sqrt(self.in_features)
        generator = torch.Generator().manual_seed(stable_hash(f"{seed}:{self.lora_fqn}"))
        full = torch.empty(self.lora_config.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        copy_full_(self.lora_a.weight, full)
        self.lora_b.weight.zero_()

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """s · B A, the update of the weight: full, (out_features, in_features), fp32. Unshards the factors alone."""
        a, b = (_full(factor.weight).float() for factor in (self.lora_a, self.lora_b))
        return self.lora_config.scaling * (b @ a)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the weight, in fp32 and rounded once. The base weight is kept for `unmerge`."""
        delta = self.delta_weight().t() if self.lora_transposed else self.delta_weight()
        if isinstance(self.weight, DTensor):
            mesh, placements = self.weight.device_mesh, self.weight.placements
            delta = distribute_tensor(delta, mesh, placements, src_data_rank=None)
        self.lora_unmerged = self.weight.detach().clone()
        self.weight.copy_(self.weight.float() + delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base weight back, bit for bit."""
        assert self.lora_unmerged is not None
        self.weight.copy_(self.lora_unmerged)
        self.lora_unmerged = None

    def unload(self) -> None:
        """Makes this a plain linear again, of the class it was, with the weight that it has now."""
        names = ["lora_a", "lora_b", "lora_config", "lora_fqn", "lora_unmerged", "lora_enabled", "lora_transposed"]
        for name in names + ["in_features", "out_features"] * self.lora_transposed:
            if name in {**self.__dict__, **self._modules}:
                delattr(self, name)
        mro = type(self).mro()
        plain = mro[mro.index(LoRALinear) + 1]
        self.__class__ = subclass_with(FSDPModule, plain) if isinstance(self, FSDPModule) else plain

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, but leaves the factors' parameters to the factors.

        `ColwiseParallel` offers every parameter below a linear under its dotted name, and the factors' again when
        it visits them.
        """
        if name not in self.adapter_parameter_names:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        config = self.lora_config
        return f"{super().extra_repr()}, rank={config.rank}, alpha={config.alpha}, dropout={config.dropout}"


def is_linear(module: nn.Module) -> bool:
    """Whether a module can get an adapter."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """By name, so that transformers, whose GPT-2 alone is made of them, need not be imported."""
    return any(f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).mro())


def add_adapter(linear: nn.Linear, config: LoRAConfig, *, fqn: str, dtype: torch.dtype | None = None) -> LoRALinear:
    """Turns `linear` into a `LoRALinear` in place; its parameters are not touched. The adapter is left unset.

    Args:
        linear: Any `nn.Linear`, or transformers' `Conv1D`, on any device, meta included.
        fqn: Its name in the whole model.
        dtype: Dtype of the factors; the weight's if left out.
    """
    if _is_conv1d(linear):
        linear.lora_transposed = True  # type: ignore[assignment]
        linear.in_features, linear.out_features = linear.weight.shape
    like = torch.empty(0, device=linear.weight.device, dtype=dtype or linear.weight.dtype)
    linear.lora_config = config  # type: ignore[assignment]
    linear.lora_fqn = fqn  # type: ignore[assignment]
    # On the instance, since graphs of torch.compile guard on an attribute's place, too.
    linear.lora_enabled, linear.lora_unmerged = True, None  # type: ignore[assignment]
    linear.lora_a = LoRAFactor(linear.in_features, config.rank, rank_dim=0, like=like)
    linear.lora_b = LoRAFactor(config.rank, linear.out_features, rank_dim=1, like=like)
    linear.__class__ = subclass_with(LoRALinear, type(linear))  # type: ignore[arg-type]
    assert isinstance(linear, LoRALinear)
    return linear


@functools.cache
def subclass_with(mixin: type, cls: type) -> type:
    """A class that is both, `mixin` first; one per pair, so that equal modules have equal classes."""
    return type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {"__module__": mixin.__module__})


def _full(param: torch.Tensor) -> torch.Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param


@torch.no_grad()
def copy_full_(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copies the full tensor into `param`: all of it, or this rank's slice of a DTensor, without communication."""
    if isinstance(param, DTensor):
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(full)


def _local(x: torch.Tensor, mesh: DeviceMesh, placement: Placement, *, grad: Placement) -> torch.Tensor:
    """This rank's part of x under `placement`; its gradient comes back with placement `grad`."""
    assert isinstance(x, DTensor)
    if x.placements != (placement,):  # a redistribution that changes nothing would still all-reduce a Partial gradient
        x = x.redistribute(mesh, [placement])
    return x.to_local(grad_placements=[grad])


def _to_local(param: torch.Tensor | None) -> torch.Tensor | None:
    return param.to_local() if isinstance(param, DTensor) else param


def _as_dtensor(local: torch.Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    """`local` as a DTensor of a global shape, which the local one does not tell where shards are uneven."""
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


def stable_hash(text: str) -> int:
    """63 bits of SHA-256: the same on every rank, machine and Python, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
