"""How a model stores its routed experts, and which way round PEFT's factors of a stack are.

    one by one   ...experts.3.gate_proj.weight (out, in), .up_proj, .down_proj, or w1, w3, w2 (Mixtral)
    stacked      ...experts.gate_up_proj (experts, 2 out, in), the gate's rows first, ...experts.down_proj;
                 Llama 4 and gpt-oss (experts, in, 2 out), gpt-oss with gate and up in turns

PEFT's A goes over a stack's last dim and B over its second, unless transformers' class is flagged as transposed, as
gpt-oss's is: then, and in all models before PEFT 0.19, A goes over the second. Where shapes tell, they decide.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_converter.hf.expert_patterns import SPELLINGS, split_expert
from lora_converter.hf.stacked import INNER, OUTER

Dims = tuple[int, int]
"""Two sizes: (P, Q) of factors, (in_features, out_features), or the last two of a stacked weight."""

_TURNED_IN = (0, 19)
"""PEFT's version from which on A goes over the last dim."""


@dataclass(frozen=True)
class Layout:
    """How stacked experts of a type of model are stored.

    Attributes:
        in_out: (experts, in, out), where shapes do not tell.
        flagged: transformers' class is flagged as transposed.
        interleaved: Outputs 0, 2, 4, ... are the gate's, the others the up projection's; else one half after the other.
    """

    in_out: bool = False
    flagged: bool = False
    interleaved: bool = False


_LAYOUTS = {
    "aria": Layout(in_out=True, flagged=True),
    "aria_text": Layout(in_out=True, flagged=True),
    "gpt_oss": Layout(in_out=True, flagged=True, interleaved=True),
    "llama4": Layout(in_out=True),
    "llama4_text": Layout(in_out=True),
    "openai_privacy_filter": Layout(in_out=True, flagged=True),
}


def layout_of(model_type: str) -> Layout:
    """By transformers' `model_type`; (experts, out, in), one half after the other, of all not known to differ."""
    return _LAYOUTS.get(model_type, Layout())


def goes_over_second(pairs: Sequence[tuple[Dims, Dims]], *, flagged: bool, version: str) -> bool:
    """Whether A goes over the second dim of a module's stacked weights, and B over the last; one answer for all.

    Args:
        pairs: (P, Q) of each adapted weight's factors, and the weight's last two dims.
        flagged: See `Layout`.
        version: PEFT's, that wrote the factors; empty if not known, which is that of an old one.

    Raises:
        ValueError: Factors are of another size, or go different ways.
    """
    told = set()
    for factors, stored in pairs:
        if factors not in (stored, stored[::-1]):
            raise ValueError(f"factors over {factors[0]} and {factors[1]}, of a weight of {stored[0]} x {stored[1]}")
        if stored[0] != stored[1]:
            told.add(factors == stored)
    if len(told) > 1:
        raise ValueError("of two stacked weights, the factors of one go the other way round")
    return told.pop() if told else flagged or _is_before_turn(version)


@dataclass
class StoredExperts:
    """The experts of a layer, as they are stored.

    Attributes:
        name: Of the module that holds them.
        experts: How many.
        weights: Name of a stack -> its last two dims. PEFT knows experts that are stored one by one as stacks too.
        spelling: Of the products, if the experts are stored one by one.
    """

    name: str
    layout: Layout
    experts: int = 0
    weights: dict[str, Dims] = field(default_factory=dict)
    spelling: tuple[str, ...] = ()

    @property
    def in_out(self) -> bool:
        """Whether the stacks are (experts, in, out). Two stacks tell by their shapes: gate and up is the wider one."""
        if self.weights.keys() >= {INNER, OUTER}:
            first, second = self.weights[INNER], self.weights[OUTER]
            told = [(first[w], first[1 - w]) == (2 * second[1 - w], second[w]) for w in (0, 1)]
            if any(told):
                return told[1]
        return self.layout.in_out

    def features(self, stack: str) -> Dims:
        """(in_features, out_features) of an expert of a stack."""
        dims = self.weights[stack]
        return dims if self.in_out else dims[::-1]

    def outputs(self, half: int, width: int) -> slice:
        """The outputs of gate and up together that are the gate's (0) or the up projection's (1), `width` each."""
        return slice(half, None, 2) if self.layout.interleaved else slice(half * width, (half + 1) * width)


def stored_experts(stored: Mapping[str, Sequence[int]], layout: Layout) -> dict[str, StoredExperts]:
    """The module that holds a layer's experts -> how, of all weights of a model with their shapes."""
    layers: dict[str, StoredExperts] = {}
    for key, shape in stored.items():
        owner, _, stack = key.rpartition(".")
        if parts := split_expert(key.removesuffix(".weight")):
            owner, number, product = parts
            layer = layers.setdefault(owner, StoredExperts(owner, layout))
            layer.experts = max(layer.experts, number + 1)
            layer.spelling = next(spelling for spelling in SPELLINGS if product in spelling)
            is_down = product == layer.spelling[2]
            layer.weights[OUTER if is_down else INNER] = (shape[0] * (1 if is_down else 2), shape[1])
        elif len(shape) == 3 and stack in (INNER, OUTER):
            layer = layers.setdefault(owner, StoredExperts(owner, layout))
            layer.experts, layer.weights[stack] = shape[0], (shape[1], shape[2])
    return layers


def _is_before_turn(version: str) -> bool:
    """An empty version is that of a file from before 0.18, which does not say."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) < _TURNED_IN
