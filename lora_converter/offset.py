"""A linear whose factors begin at a part of its weight, and which trains what they move away from there.

    y = x Wᵀ + b + s · x (B A - B₀ A₀)ᵀ        W, b, A₀, B₀ frozen;  A = A₀ and B = B₀ at the start

    PiSSA    A₀ = √(S/s) Vᵀ, B₀ = U √(S/s)  of W = U S Vᵀ, cut to the rank   (https://arxiv.org/abs/2404.02948)
    OLoRA    A₀ = R, B₀ = Q                 of W = Q R, likewise             (https://arxiv.org/abs/2406.01775)

Both papers, and PEFT, put W - s B₀ A₀ in the base's place and train s B A on it. The sum is the same, and so are the
gradients of A and B; but here the base is not touched, so that it is loaded, packed, fingerprinted and served as ever.

What is added is one product of rank 2r. Of the ways to write it this is the one that has no large terms to cancel,

    B A - B₀ A₀  =  [B - B₀, B₀] [A; A - A₀]

so that it is exactly zero at the start, in any dtype, and later as precise as the factors are. It is what an export
holds, a plain adapter. Not here: when a run computes the factors, and who does (`run/initial_factors.py`).
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn

from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear, add_adapter
from lora_converter.names import stable_hash
from lora_converter.tensor_parallel import LoRAFactor
from lora_converter.tensors import copy_full_, full_tensor, local_part
from lora_converter.updates import low_rank_updates, weight_sides

Tensor = torch.Tensor


class OffsetLinear(LoRALinear):
    """What a linear's class gains: a trained update that is the difference of two products. Put on by `apply_lora`.

    Attributes:
        lora_a0: A₀, weight (rank, in_features).
        lora_b0: B₀, weight (out_features, rank).
    """

    factor_names: ClassVar = ("lora_a", "lora_b", "lora_a0", "lora_b0")
    adapter_parameter_names: ClassVar = ("lora_a.weight", "lora_b.weight", "lora_a0.weight", "lora_b0.weight")
    frozen_parameter_names: ClassVar = ("lora_a0.weight", "lora_b0.weight")
    zero_at_start: ClassVar = ()

    lora_a0: LoRAFactor
    lora_b0: LoRAFactor

    def product_factors(self, *, local: bool) -> tuple[Tensor, Tensor]:
        a, b = super().product_factors(local=local)
        a0, b0 = self.lora_a0.weight, self.lora_b0.weight
        return plain_factors(a, b, *((local_part(a0), local_part(b0)) if local else (a0, b0)))

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        """All zero: the factors are the base's, whose weights may not be there yet (see `reset_from_base`)."""
        for param in self.adapter_parameters().values():
            param.zero_()

    @torch.no_grad()
    def reset_from_base(self, seed: int) -> None:
        """The factors of the weight that is there. A collective where it is sharded."""
        self.set_factors(*initial_factors(self.whole_weight(), self.lora_config, name=self.lora_canonical_name))

    def local_updates(self, weight: str) -> Iterator[Tensor]:
        """s · B A - s · B₀ A₀, in one piece: sharded factors cannot always be put beside each other."""
        a, b, a0, b0 = self.adapter_parameters().values()
        like, scaling, transposed = self.get_parameter(weight), self.lora_config.scaling, self.lora_transposed
        sides = (weight_sides(*pair, transposed=transposed) for pair in ((a, b), (a0, b0)))
        pieces = (low_rank_updates(*pair, like, scaling=scaling) for pair in sides)
        return (now.sub_(start) for now, start in zip(*pieces, strict=True))

    def whole_weight(self) -> Tensor:
        """W, (out_features, in_features), whole. A collective where it is sharded."""
        weight = full_tensor(self.weight.detach())
        return weight.t() if self.lora_transposed else weight

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Begins at s B A.

        Args:
            a: (rank, in_features), whole.
            b: (out_features, rank), whole.
        """
        for name, full in zip(self.adapter_parameter_names, (a, b, a, b), strict=True):
            copy_full_(self.get_parameter(name), full)


def add_offset(linear: nn.Module, config: LoRAConfig, *, fqn: str, **options: Any) -> LoRALinear:
    """As `add_adapter`, for `config.init`, of which `check_init` has found nothing amiss."""
    return add_adapter(linear, config, fqn=fqn, kind=OffsetLinear, **options)


def plain_factors(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of B A - B₀ A₀ as one product, of twice the rank: (2 rank, in_features), (out_features, 2 rank)."""
    return torch.cat([a, a - a0], 0), torch.cat([b - b0, b0], 1)


def make_plain(tensors: MutableMapping[str, Tensor]) -> None:
    """Turns tensors of adapters into those of plain ones (see `LoRAConfig.of_plain`), in place. Others stay.

    Args:
        tensors: By their names in the model, whole.
    """
    names = OffsetLinear.adapter_parameter_names
    for fqn in [name.removesuffix(names[2]) for name in tensors if name.endswith(f".{names[2]}")]:
        a, b = plain_factors(*(tensors.pop(f"{fqn}{name}") for name in names))
        tensors.update({f"{fqn}{names[0]}": a, f"{fqn}{names[1]}": b})


def undo_plain(tensors: MutableMapping[str, Tensor]) -> None:
    """The inverse of `make_plain`, of what it has made, but for the rounding of two sums."""
    names = OffsetLinear.adapter_parameter_names
    for fqn in [name.removesuffix(names[0]) for name in tensors if name.endswith(f".{names[0]}")]:
        (a, gone), (moved, b0) = (tensors[f"{fqn}{names[i]}"].chunk(2, i) for i in (0, 1))
        tensors.update(zip((f"{fqn}{name}" for name in names), (a, b0 + moved, a - gone, b0), strict=True))


def initial_factors(weight: Tensor, config: LoRAConfig, *, name: str) -> tuple[Tensor, Tensor]:
    """A₀ (rank, in_features) and B₀ (out_features, rank) of a weight, in fp32, as PEFT 0.21 computes them.

    Args:
        weight: (out_features, in_features), whole, of any floating dtype.
        config: Of the module; its `init` says which.
        name: Seeds a randomised SVD.
    """
    weight, rank = weight.float(), config.rank
    if config.init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    _, _, iterations = config.init.partition("_niter_")
    if iterations:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(stable_hash(name))
            u, s, v = torch.svd_lowrank(weight, rank, niter=int(iterations))
            vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / config.scaling).sqrt()
    return root.unsqueeze(1) * vh[:rank], u[:, :rank] * root


def check_init(config: LoRAConfig, linears: Mapping[str, tuple[nn.Module, int]], *, experts: Sequence[str]) -> None:
    """Refuses modules whose factors cannot begin at their weight.

    Args:
        linears: Those that get an adapter, by name, with their ranks.
        experts: Modules of routed experts that get one.

    Raises:
        ValueError: Experts, packed weights, or a rank above a linear's smaller side.
    """
    if experts:
        raise ValueError(
            f"lora.init = {config.init!r}: adapters on routed experts begin at zero alone, but {', '.join(experts)} "
            "would get some. Take experts out of lora.target_modules, or leave lora.init out."
        )
    packed = [fqn for fqn, (linear, _) in linears.items() if _is_packed(linear)]
    if packed:
        raise ValueError(
            f"lora.init = {config.init!r}: the factors are those of the weight that is computed with, which is packed "
            f"or quantized for {', '.join(packed)}. Leave lora.base_format out, or leave lora.init out."
        )
    sides = [(fqn, rank, min(linear.get_parameter("weight").shape)) for fqn, (linear, rank) in linears.items()]
    if wide := [f"{fqn} (rank {rank}, at most {most})" for fqn, rank, most in sides if rank > most]:
        raise ValueError(
            f"lora.init = {config.init!r}: the rank is above the smaller side of {', '.join(wide)}. Lower lora.rank, "
            "or give these linears another in lora.rank_pattern."
        )


def _is_packed(linear: nn.Module) -> bool:
    """Whether a weight holds codes: packed here, or quantized by others, bitsandbytes' bytes or torchao's tensors."""
    weight = linear.get_parameter("weight")
    is_quantized = weight.dtype.itemsize == 1 or type(weight).dequantize is not Tensor.dequantize
    return bool(getattr(linear, "packed_format", "")) or is_quantized
