"""Where the weights of routed experts stand in Hugging Face's model, asked of the model's StateDictAdapter.

    per expert   ...experts.3.gate_proj.weight (out, in)          Qwen3-MoE, DeepSeek-V3; PEFT's factors: as a linear's
    stacked      ...experts.gate_up_proj (experts, in, out)       Llama 4, gpt_oss; PEFT's factors: stacked too

A stacked weight may hold several of the host's, as gate_up_proj holds w1 and w3. The adapter combines them when it is
given all of them alone, so an experts module is asked about as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_converter.hf.naming import StateDictAdapter, hf_parts, hf_parts_together

_PACKED = "_blocks"
"""Ending of the names of MXFP4 weights, (experts, out, in), whose plain form is (experts, in, out): gpt_oss."""

ExpertShapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""FQN of an experts module -> its weights -> (experts, out_features, in_features)."""


@dataclass(frozen=True)
class Held:
    """Where one weight of the host's, W (out, in) of each expert, stands in a Hugging Face weight.

    Attributes:
        weight: Its name in the experts module, `w1`.
        place: The rows of the Hugging Face weight, seen as (out, in), that hold W.
        rows: W's rows in the order they have there; None if in W's own.
        columns: W's columns, likewise.
    """

    weight: str
    place: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None


@dataclass(frozen=True)
class HFExperts:
    """A Hugging Face weight that holds experts of the host.

    Attributes:
        name: As PEFT knows it: a module, `...experts.3.gate_proj`, or a parameter, `...experts.gate_up_proj`.
        expert: Whose it is; None if it has all of them.
        shape: (out, in) of one expert.
        in_first: It is stored as (experts, in, out).
        flagged: transformers says so of its module (`is_transposed`), and PEFT goes by it.
    """

    name: str
    expert: int | None
    shape: tuple[int, int]
    held: tuple[Held, ...]
    in_first: bool = False
    flagged: bool = False

    def holds(self, weight: str) -> bool:
        """Whether it has some of a weight."""
        return any(each.weight == weight for each in self.held)

    @property
    def is_swapped(self) -> bool:
        """PEFT takes the rows of the weight for its columns: its A goes over what experts give."""
        return self.in_first and not self.flagged

    @property
    def stored_name(self) -> str:
        """The weight's key in transformers' model."""
        return self.name if self.expert is None else f"{self.name}.weight"

    def stored_shape(self, experts: int) -> tuple[int, ...]:
        """The weight's shape there."""
        if self.expert is not None:
            return self.shape
        return (experts, *(self.shape[::-1] if self.in_first else self.shape))


def hf_experts(adapter: StateDictAdapter, fqn: str, shapes: Mapping[str, tuple[int, ...]]) -> list[HFExperts]:
    """Where the weights of an experts module stand in Hugging Face's model.

    Args:
        shapes: The module's weights -> (experts, out_features, in_features).

    Raises:
        ValueError: The adapter cannot express them, or does so by more than taking experts apart, combining their rows
            and reordering.
    """
    keys = {f"{fqn}.{weight}": weight for weight in shapes}
    try:
        parts = {key: hf_parts(adapter, key, tuple(shapes[weight])) for key, weight in keys.items()}
    except ValueError:
        parts = hf_parts_together(adapter, {key: tuple(shapes[weight]) for key, weight in keys.items()})
    found: dict[str, HFExperts] = {}
    for key, weight in keys.items():
        for part in parts[key]:
            expert_dim, out_dim, in_dim = part.dims
            mixed = f"{key}: {type(adapter).__name__} stores it in {part.name} in a way that no adapter fits."
            if out_dim is None or in_dim is None or (part.indices[0] is not None and expert_dim is not None):
                raise ValueError(mixed)
            held = Held(weight, part.places[1], part.indices[1], part.indices[2])
            if expert_dim is None and part.name.endswith(".weight") and len(part.shape) == 2 and out_dim < in_dim:
                index = part.indices[0]
                assert index is not None
                name, expert = part.name.removesuffix(".weight"), int(index[0])
            elif expert_dim == 0 and len(part.shape) == 3:
                name, expert = part.name.removesuffix(_PACKED), None
            else:
                raise ValueError(mixed)
            packed = part.name.endswith(_PACKED)
            shape = (part.shape[out_dim], part.shape[in_dim])
            before = found.get(name, HFExperts(name, expert, shape, (), in_dim < out_dim or packed, packed))
            found[name] = HFExperts(name, expert, shape, (*before.held, held), before.in_first, before.flagged)
    return list(found.values())
