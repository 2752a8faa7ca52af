"""A base as a training with packed weights had it: which weights of its folder were packed, and what was unpacked.

Which they were is what the adapter's directory records (`packed_base.py`). Where it records nothing, a directory of
PEFT's own QLoRA for one, their names decide: linears and routed experts; no embedding, no output head, no router.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.expert_layouts import StoredExperts, layout_of, stored_experts
from lora_converter.hf.expert_patterns import SPELLINGS, split_expert
from lora_converter.hf.folder import ModelFolder
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.stacked import INNER, OUTER
from lora_converter.packed_formats import FORMATS

logger = logging.getLogger(__name__)

BASES = ("nf4",)
"""What a base can be merged as, beside itself."""

CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
"""transformers' models whose linears are Conv1D, and the names of those that are."""

_NOT_PACKED = {"lm_head", "embed_out", "output", "head", "score", "classifier", "wte", "wpe", "gate", "router"}
_NOT_PACKED_ENDS = ("_gate", "attention_bias")
"""Heads, embeddings and routers by the last parts of their names, beside all with "emb" in it."""

_QUANTIZED = (".absmax", "_scales", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class AsPacked:
    """How one weight is packed.

    Attributes:
        transposed: It is stored as (in, out), and of stacked experts as (experts, in, out).
    """

    key: str
    form: str
    transposed: bool

    @property
    def rows_together(self) -> int:
        """How many rows of the weight, as it is stored, are to be unpacked together, or a multiple of it."""
        return FORMATS[self.form].block if self.transposed else FORMATS[self.form].rows_together

    def unpacked(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as it is stored, or some of its rows, -> what it was in the training, fp32.

        Args:
            weight: (..., out, in) or, transposed, (..., in, out); see `rows_together`.

        Raises:
            ValueError: It holds nan or inf.
        """
        packed = FORMATS[self.form]
        matrix = weight.mT.contiguous() if self.transposed else weight
        try:
            unpacked = packed.unpack(packed.pack(matrix), torch.float32)
        except ValueError as e:
            raise ValueError(f"{self.key}: {e}") from None
        return unpacked.mT if self.transposed else unpacked


def check_base_as(base: ModelFolder, base_as: str, packed: PackedBase | None) -> None:
    """Refuses what a base cannot be merged as.

    Raises:
        ValueError: There is no such form, the adapter was trained on another, or the base holds packed weights itself.
    """
    if base_as not in BASES:
        raise ValueError(f"--base-as {base_as} is not known. It may be {', '.join(BASES)}, or be left out.")
    if packed is not None and packed.form != base_as:
        raise ValueError(
            f"--base-as {base_as}: the adapter was trained on {packed.form} weights, as its base was released with "
            "them. Leave --base-as out, and merge into an unquantized copy of the base."
        )
    if "quantization_config" in base.config or any(key.endswith(_QUANTIZED) for key in base.weights):
        raise ValueError(
            f"--base-as {base_as}: {base.path} holds quantized weights itself. Merge into the unquantized original, "
            f"which becomes {base_as} on the way."
        )


def tell_of_packed(packed: PackedBase | None, base_as: str, count: int) -> None:
    """Logs what an adapter of a training on packed weights is merged into, and what else it could be merged into.

    Args:
        count: How many weights are merged as they were in the training.
    """
    if base_as:
        logger.info(
            "%d weights of the base are merged as %s, as the training had them; without --base-as the base's own are.",
            count,
            base_as,
        )
    elif packed is not None:
        logger.info(
            "The adapter was trained on %s weights, and is merged into the base's own%s.",
            packed.form,
            f"; `lora-converter merge --base-as {packed.form}` takes those of the training" * (packed.form in BASES),
        )


def weights_as(
    base: ModelFolder,
    form: str,
    packed: PackedBase | None,
    *,
    transposed: Mapping[str, bool] = MappingProxyType({}),
) -> dict[str, AsPacked]:
    """Key -> how it is packed, of every weight of a base that the training had packed.

    Args:
        packed: What the adapter's directory records.
        transposed: Keys of linears -> whether they are stored as (in, out), where that is known already.

    Raises:
        ValueError: The base lacks weights that were packed, or has other shapes.
    """
    kind = str(base.config.get("model_type", ""))
    shapes = {key: entry.shape for key, (_, entry) in base.weights.items()}
    layers = stored_experts(shapes, layout_of(kind))
    stacks = {
        f"{layer.name}.{stack}": layer for layer in layers.values() if not layer.spelling for stack in layer.weights
    }
    keys = _by_names(base, stacks) if packed is None else _recorded(shapes, layers, packed, kind)
    found, others = {}, []
    for key in keys:
        of_linear = transposed.get(key, is_conv1d(kind, key.removesuffix(".weight")))
        is_transposed = stacks[key].in_out if key in stacks else of_linear
        is_matrix = base.weights[key][1].is_float and len(shapes[key]) == (3 if key in stacks else 2)
        if is_matrix and FORMATS[form].fits(shapes[key][-2 if is_transposed else -1]):
            found[key] = AsPacked(key, form, is_transposed)
        else:
            others.append(key)
    if packed is not None and others:
        raise ValueError(f"{', '.join(others)} of {base.path} were packed in the training, and cannot be packed here.")
    if packed is None:
        experts = sum(key in stacks or split_expert(key.removesuffix(".weight")) is not None for key in found)
        logger.warning(
            "The adapter does not say which weights its training had packed. Their names say: %d linears and %d "
            "weights of experts are %s%s.",
            len(found) - experts,
            experts,
            form,
            f"; {', '.join(others)} cannot be packed" if others else "",
        )
    return found


def is_conv1d(kind: str, module: str) -> bool:
    """Whether a linear is transformers' Conv1D, whose weight is (in, out)."""
    return kind in CONV1D_MODELS and _last(module) in _CONV1D_MODULES


def _by_names(base: ModelFolder, stacks: Iterable[str]) -> list[str]:
    linears = [
        key
        for key, (_, entry) in base.weights.items()
        if key.endswith(".weight") and len(entry.shape) == 2 and not _is_no_linear(_last(key.removesuffix(".weight")))
    ]
    return [*linears, *stacks]


def _is_no_linear(last: str) -> bool:
    return last in _NOT_PACKED or "emb" in last or last.endswith(_NOT_PACKED_ENDS)


def _recorded(
    shapes: Mapping[str, list[int]], layers: Mapping[str, StoredExperts], packed: PackedBase, kind: str
) -> list[str]:
    """The keys that the record means, under whatever names and in whatever form the base stores them."""
    known, owners = Aliases((key.removesuffix(".weight") for key in shapes), kind), Aliases(layers, kind)
    found: dict[str, None] = {}
    missing, pieces = [], Counter[str]()
    for name in packed.names():
        module = name.removesuffix(".weight")
        if (same := known.find(module)) is not None:
            found[same if same in shapes else f"{same}.weight"] = None
            continue
        parts = split_expert(module)
        layer = layers.get(owners.find(parts[0] if parts else module.rpartition(".")[0]) or "")
        others = [key for key in _other_form(layer, module) if key in shapes] if layer else []
        if parts:
            pieces.update(others)  # a stack was packed if all that is in it was
        else:
            found |= dict.fromkeys(others)
        missing += [] if others else [name]
    for stack, count in pieces.items():
        whole = count == shapes[stack][0] * (2 if _last(stack) == INNER else 1)
        found |= {stack: None} if whole else {}
        missing += [] if whole else [stack]
    if missing:
        shown = ", ".join(PackedBase.of(packed.form, missing).weights)
        raise ValueError(f"The training had {shown} packed, which are not in the base. Name the base of its training.")
    return list(found)


def _other_form(layer: StoredExperts, module: str) -> Iterator[str]:
    """Where an expert's weight is in a stack, or a stack's weights are by themselves."""
    parts, stack = split_expert(module), _last(module)
    if parts and not layer.spelling:
        place = next(spelling.index(parts[2]) for spelling in SPELLINGS if parts[2] in spelling)
        yield f"{layer.name}.{OUTER if place == 2 else INNER}"
    elif not parts and layer.spelling and stack in (INNER, OUTER):
        products = layer.spelling[:2] if stack == INNER else layer.spelling[2:]
        yield from (f"{layer.name}.{e}.{product}.weight" for e in range(layer.experts) for product in products)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
