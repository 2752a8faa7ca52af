"""Which weights of its base a training had packed, in Hugging Face's names: what a PEFT directory records of it.

    lora_converter.base_format      nf4
    lora_converter.packed_weights   ["model.layers.{0-31}.mlp.down_proj.weight", ...]

A pattern means the weights with the numbers between its braces, all of them and no others. So it takes none that was
not packed, whatever else a base folder holds under such names: layers for multi-token prediction, a vision tower.
"""

import itertools
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_converter.hf.expert_naming import HFExperts, hf_experts
from lora_converter.hf.naming import StateDictAdapter, hf_linears
from lora_converter.packed_formats import FORMATS

logger = logging.getLogger(__name__)

_FORMAT, _WEIGHTS = "lora_converter.base_format", "lora_converter.packed_weights"
_BRACES = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")
_MOST_NAMES = 2**20


@dataclass(frozen=True)
class PackedBase:
    """A base with packed weights.

    Attributes:
        form: The name of their format.
        weights: Patterns of their names.
    """

    form: str
    weights: tuple[str, ...]

    @staticmethod
    def of(form: str, names: Iterable[str]) -> "PackedBase":
        """Of the names of the weights, each number a part of its own between dots, or none at all."""
        return PackedBase(form, tuple(_patterns(names)))

    def names(self) -> list[str]:
        """The names of the packed weights."""
        return [name for pattern in self.weights for name in _names(pattern)]

    def to_metadata(self) -> dict[str, str]:
        """As it stands in the header of a weights file."""
        return {_FORMAT: self.form, _WEIGHTS: json.dumps(self.weights)}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], what: str) -> "PackedBase | None":
        """The inverse; None of a file that says nothing of it.

        Raises:
            ValueError: What it says is damaged, or of a format that is not known here.
        """
        if not {_FORMAT, _WEIGHTS} & metadata.keys():
            return None
        form = metadata.get(_FORMAT, "")
        try:
            weights = json.loads(metadata.get(_WEIGHTS, ""))
        except ValueError:
            weights = None
        return PackedBase.of_patterns(form, weights, f"{what}, in its header")

    @staticmethod
    def of_patterns(form: str, weights: Any, what: str) -> "PackedBase":
        """Of patterns that a file has.

        Raises:
            ValueError: They are none, or of a format that is not known here.
        """
        if not isinstance(weights, list) or not all(isinstance(each, str) for each in weights):
            raise ValueError(f"{what}: what was packed is no list of names.")
        if form not in FORMATS:
            raise ValueError(f"{what}: weights were packed as {form!r}; known are {', '.join(FORMATS)}.")
        if sum(map(_count, weights)) > _MOST_NAMES:
            raise ValueError(f"{what}: what was packed are more weights than any model has.")
        return PackedBase(form, tuple(weights))


def packed_base(adapter: StateDictAdapter, packed: Mapping[str, tuple[str, tuple[int, ...]]]) -> PackedBase | None:
    """A host's packed weights in Hugging Face's names; None if there are none.

    Those that have no name are logged, and so are weights of two formats, of which there is no record.

    A weight whose columns Hugging Face's model has in another order has none: its blocks run along columns.

    Args:
        packed: The host's names, `layers.0.attention.wq.weight` or `layers.1.moe.experts.w1`, -> format, and shape of
            the weight before it was packed, (out, in) or (experts, out, in).
    """
    forms = sorted({form for form, _ in packed.values()})
    if not forms:
        return None
    if len(forms) > 1:
        logger.warning("LoRA: the base is packed as %s, which the adapter's directory has no words for.", forms)
        return None
    form, weights = forms[0], {name: shape for name, (_, shape) in packed.items()}
    names, without = [], []
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, shape in weights.items():
        fqn, _, last = key.rpartition(".")
        if len(shape) == 3:
            modules[fqn][last] = shape
            continue
        try:
            linears = hf_linears(adapter, fqn, out_features=shape[0], in_features=shape[1])
        except ValueError:
            linears = []
        if linears and all(linear.columns is None for linear in linears):
            names += [f"{linear.name}.weight" for linear in linears]
        else:
            without.append(key)
    for fqn, shapes in modules.items():
        try:
            parts = hf_experts(adapter, fqn, shapes)
        except ValueError:
            parts = []
        if parts and all(map(_is_whole, parts)):
            names += [part.stored_name for part in parts]
        else:
            without += [f"{fqn}.{weight}" for weight in shapes]
    if without:
        logger.warning(
            "LoRA: %s are packed, and Hugging Face's model has them not or otherwise: `lora-converter merge --base-as "
            "%s` takes them as they are in the base.",
            ", ".join(PackedBase.of(form, without).weights),
            form,
        )
    return PackedBase.of(form, names)


def _is_whole(part: HFExperts) -> bool:
    """Whether all of a Hugging Face weight is packed, along the columns that it has there."""
    rows = sum(part.shape[0] if held.place is None else len(held.place) for held in part.held)
    return rows == part.shape[0] and all(held.columns is None for held in part.held)


def _patterns(names: Iterable[str]) -> list[str]:
    """Names with what they have in common written once: one number's place after the other, the last first."""
    found = {tuple(name.split(".")) for name in names}
    for place in reversed(range(max(map(len, found), default=0))):
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
        for parts in [parts for parts in found if place < len(parts) and _is_number(parts[place])]:
            found.discard(parts)
            groups[parts[:place], parts[place + 1 :]].append(int(parts[place]))
        found |= {(*before, _in_braces(numbers), *after) for (before, after), numbers in groups.items()}
    return sorted(map(".".join, found))


def _is_number(part: str) -> bool:
    return part.isdecimal() and part == str(int(part))


def _in_braces(numbers: list[int]) -> str:
    """`{0-31,40}`; one number by itself has no braces."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _ranges(braces: str) -> list[range]:
    ends = [part.partition("-") for part in braces.split(",")]
    return [range(int(first), int(last or first) + 1) for first, _, last in ends]


def _count(pattern: str) -> int:
    return math.prod(sum(map(len, _ranges(braces))) for braces in _BRACES.findall(pattern))


def _names(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)  # text, braces, text, ...
    numbers = [[str(number) for run in _ranges(braces) for number in run] for braces in parts[1::2]]
    return [
        "".join(itertools.chain(*zip(parts[::2], (*chosen, ""), strict=True))) for chosen in itertools.product(*numbers)
    ]
