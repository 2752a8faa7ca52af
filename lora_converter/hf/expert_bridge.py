"""Adapters on routed experts in a host's names as PEFT's and back; `bridge.py` for linears.

    host   layers.1.moe.experts.w1_lora_a (experts, in, rank), .w1_lora_b (experts, out, rank)
    PEFT   ...experts.3.gate_proj: A (rank, in), B (out, rank)                       experts stored by themselves
           ...experts.gate_up_proj: A (experts, rank, in), B (experts, out, rank)    experts stacked

PEFT takes experts that are stored by themselves all together or not at all: what has no adapter gets zeros. A stacked
weight that holds several of the host's gets their factors side by side: A's along the rank, B's as a block diagonal.
Where such a weight is stored as (experts, in, out) and its module does not say so, PEFT takes rows for columns, and the
two factors change places.
"""

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lora_converter.config import LoRAConfig
from lora_converter.fit import Misfit
from lora_converter.hf.expert_naming import ExpertShapes, Held, HFExperts, hf_experts
from lora_converter.hf.expert_patterns import alpha_for, split_expert
from lora_converter.hf.experts import fit_experts, own_rank, shares_of_rank
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.names import stable_hash

logger = logging.getLogger(__name__)

Factors = tuple[torch.Tensor, torch.Tensor]

_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Piece:
    """A Hugging Face weight's factors of one weight of the host: A (experts, rank, in), B (experts, out, rank)."""

    part: HFExperts
    held: Held
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass
class ReadWeight:
    """What an adapter holds for one weight of an experts module.

    Attributes:
        name: The weight's, in the host's model.
        shape: (experts, out_features, in_features).
    """

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Modules of single experts that the adapter has not."""

    def is_padding(self) -> bool:
        """Whether it holds nothing: PEFT's file has zeros for products without an adapter."""
        return not any(piece.a.any() or piece.b.any() for piece in self.pieces)

    def factors(self, rank: int, scaling: float) -> Factors:
        """A (experts, in, rank) and B (experts, out, rank) in the host's order.

        Experts without an adapter, and a smaller rank than `rank`, are filled up with rows as a new adapter has them,
        for which B is zero; another scaling goes into B.
        """
        experts, out_features, in_features = self.shape
        whole_a, whole_b = torch.empty(experts, in_features, rank), torch.zeros(experts, out_features, rank)
        if self.absent or any(piece.a.shape[1] < rank for piece in self.pieces):
            bound, generator = 1 / math.sqrt(in_features), torch.Generator().manual_seed(stable_hash(self.name))
            whole_a.uniform_(-bound, bound, generator=generator)
        for piece in self.pieces:
            number, own = piece.part.expert, slice(0, piece.a.shape[1])
            of = slice(None) if number is None else slice(number, number + 1)
            b = piece.b.float() if math.isclose(piece.scaling, scaling) else piece.b.float() * (piece.scaling / scaling)
            whole_a[of, _every(piece.held.columns), own] = piece.a.mT.float()
            whole_b[of, _every(piece.held.rows), own] = b
        return whole_a, whole_b


@dataclass(frozen=True)
class HostExperts:
    """An experts module of the host, and where it is stored.

    Attributes:
        fqn: Its name in the host's model.
        shapes: Its weights -> (experts, out_features, in_features).
    """

    fqn: str
    shapes: Mapping[str, tuple[int, ...]]
    parts: list[HFExperts]

    def to_peft(
        self, factors: Mapping[str, Factors], *, alpha: float, use_rslora: bool
    ) -> tuple[dict[str, Factors], dict[str, float]]:
        """PEFT's module or parameter -> its factors, and -> its alpha.

        Args:
            factors: Adapted weight -> A (experts, in, rank) and B (experts, out, rank), all of one rank.
        """
        rank = next(iter(factors.values()))[0].shape[-1]
        found: dict[str, Factors] = {}
        alphas: dict[str, float] = {}
        for part in self.parts:
            held = [each for each in part.held if each.weight in factors]
            if part.expert is None and held:
                several = len(held)
                found[part.name] = _side_by_side(part, [(each, *factors[each.weight]) for each in held])
                alphas[part.name] = alpha * (math.sqrt(several) if use_rslora else several)
            elif part.expert is not None:
                out_features, in_features = part.shape
                nothing = torch.zeros(())
                found[part.name] = nothing.expand(rank, in_features), nothing.expand(out_features, rank)
                alphas[part.name] = alpha
                for each in held:
                    a, b = (factor[part.expert] for factor in factors[each.weight])
                    found[part.name] = a[_every(each.columns)].t(), b[_every(each.rows)]
        return found, alphas

    def read(self, peft: PeftAdapter, misfit: Misfit) -> dict[str, ReadWeight]:
        """What an adapter, as `fitted_to` gives it, holds for each weight; misshapen parts are noted."""
        found = {w: ReadWeight(f"{self.fqn}.{w}", tuple(shape)) for w, shape in self.shapes.items()}
        for part in self.parts:
            if part.name not in peft.factors:
                for held in part.held:
                    found[held.weight].absent.append(part.name)
                continue
            a, b = peft.factors[part.name]
            if part.expert is not None:
                a, b = a[None], b[None]
            elif part.is_swapped:
                a, b = b.mT, a.mT
            experts = 1 if part.expert is not None else self.experts
            there, here = (a.shape[0], b.shape[1], a.shape[2]), (experts, *part.shape)
            if there != here:
                name, single = _NUMBER.sub(".experts.*.", part.name), part.expert is not None
                misfit.compare(name, there[single:], here[single:])
                misfit.misshapen = list(dict.fromkeys(misfit.misshapen))  # of many experts one
                continue
            shares = shares_of_rank(b, [_every(each.place) for each in part.held], own_rank(peft, part.name))
            for held, share in zip(part.held, shares, strict=True):
                if share is not None:
                    own_a, own_b = a[:, share], b[:, _every(held.place), share]
                    found[held.weight].pieces.append(Piece(part, held, own_a, own_b, peft.scaling_of(part.name)))
        return {weight: read for weight, read in found.items() if read.pieces and not read.is_padding()}

    def from_peft(self, peft: PeftAdapter, configs: Mapping[str, LoRAConfig], misfit: Misfit) -> dict[str, Factors]:
        """The inverse of `to_peft`; what does not fit is noted.

        Args:
            configs: Adapted weight -> its adapter's settings.
        """
        there = self.read(peft, misfit)
        if misfit.misshapen:
            return {}
        for weight in configs:
            if weight not in there:
                misfit.missing += [part.name for part in self.parts if part.holds(weight)]
            elif absent := there[weight].absent:
                names = ", ".join(briefly(absent))
                logger.info("LoRA: %s are not in the adapter; they begin as in a new one.", names)
        others = [read for weight, read in there.items() if weight not in configs]
        misfit.unknown += dict.fromkeys(piece.part.name for read in others for piece in read.pieces)
        if misfit.missing or not there:
            return {}
        config = next(iter(configs.values()))
        rank, alpha = settings_of(there, peft.use_rslora)
        misfit.compare_number(f"the rank of {self.fqn}", rank, config.rank)
        misfit.compare_number(f"the alpha of {self.fqn}", alpha, config.alpha)
        return {weight: there[weight].factors(rank, config.scaling) for weight in configs if rank == config.rank}

    @property
    def experts(self) -> int:
        """How many there are."""
        return next(iter(self.shapes.values()))[0]


def settings_of(read: Mapping[str, ReadWeight], use_rslora: bool) -> tuple[int, float]:
    """The rank and the alpha of a module whose weights may have several: the largest rank, with its scaling.

    PEFT gives a stack of gate and up twice the rank of down.
    """
    widest = max((piece for each in read.values() for piece in each.pieces), key=lambda piece: piece.a.shape[1])
    rank = widest.a.shape[1]
    return rank, alpha_for(widest.scaling, rank, use_rslora=use_rslora)


def host_experts(adapter: StateDictAdapter, experts: ExpertShapes) -> list[HostExperts]:
    """Where each experts module of a model is stored.

    Raises:
        ValueError: See `hf_experts`.
    """
    return [HostExperts(fqn, shapes, hf_experts(adapter, fqn, shapes)) for fqn, shapes in experts.items()]


def fitted_to(peft: PeftAdapter, experts: Iterable[HostExperts]) -> PeftAdapter:
    """An adapter with its experts in the form in which the host's model stores them (see `fit_experts`)."""
    parts = [(part, module.experts) for module in experts for part in module.parts]
    stored = {part.stored_name: part.stored_shape(count) for part, count in parts}
    flagged, in_first = any(part.flagged for part, _ in parts), any(part.in_first for part, _ in parts)
    kind = "gpt_oss" if flagged else "llama4" * in_first
    return fit_experts(peft, stored, model_type=kind)


def is_padding(peft: PeftAdapter, module: str) -> bool:
    """Whether factors are zeros for experts that have no adapter, which PEFT wants beside those that have one."""
    a, b = peft.factors[module]
    return (a.ndim == 3 or split_expert(module) is not None) and not (a.any() or b.any())


def briefly(names: Sequence[str]) -> list[str]:
    """Names for a message, those of many experts as one."""
    counts = Counter(_NUMBER.sub(".experts.*.", name) for name in names)
    return [f"{name} ({count} experts)" if count > 1 else name for name, count in counts.items()]


def _every(indices: torch.Tensor | None) -> torch.Tensor | slice:
    return slice(None) if indices is None else indices.long()


def _side_by_side(part: HFExperts, factors: Sequence[tuple[Held, torch.Tensor, torch.Tensor]]) -> Factors:
    """A (experts, ranks, in) and B (experts, out, ranks) of a Hugging Face weight that holds several of the host's."""
    a = torch.cat([a[:, _every(held.columns)].mT for held, a, _ in factors], 1)
    experts, rank = a.shape[0], a.shape[1] // len(factors)
    # An export to a narrow dtype leaves wide what it has no room for, so that it can be refused by name.
    dtype = functools.reduce(torch.promote_types, (own.dtype for *_, own in factors))
    b = torch.zeros(experts, part.shape[0], a.shape[1], dtype=dtype)
    for number, (held, _, own) in enumerate(factors):
        b[:, _every(held.place), number * rank : (number + 1) * rank] = own[:, _every(held.rows)].to(dtype)
    return (b.mT, a.mT) if part.is_swapped else (a, b)
