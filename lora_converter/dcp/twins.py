"""How a base gets into a model whose weights are packed, or have more rows: through twins of few weights at a time.

A packed weight (out, blocks, bytes) has a twin (out, in), bf16, sharded as it is. Whoever reads a base, from whatever
folder, reads into twins as into the weights of a model that is not packed; then each rank packs its own part, and the
twins are gone before those of the next layers are made. The dense model never exists.

A twin is what the base was before it was packed, so it is also where its fingerprint comes from.

A weight that was grown for new tokens, (rows + new, width), has a whole twin (rows, width) in main memory: its shards
begin at other rows than the base's would. Behind what it holds the weight is zeros.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from lora_converter.dcp.states import ModelSubset
from lora_converter.fingerprint import sums_of
from lora_converter.packed_formats import FORMATS
from lora_converter.tensors import copy_full_, local_part, with_local

_AT_A_TIME = 2**30
"""Bytes of twins on a rank, or those of one module."""


class Twins:
    """The base of a model as it is read: `wanted`, then `parts`, each of which is filled before the next is asked for.

    Args:
        base: The model's frozen parameters and buffers, sharded or not.
        formats: Which of them are packed -> their format.
        grown: Which of them have more rows than the base's -> how many those have.

    Attributes:
        stored_packed: Packed weights that the folder has as they are; these have no twins.
        sums: Of each packed weight that has been filled, what this rank adds to the fingerprint.
    """

    def __init__(self, base: ModelSubset, formats: Mapping[str, str], grown: Mapping[str, int] = MappingProxyType({})):
        self._base, self.formats, self._grown = base, formats, grown
        self.stored_packed: set[str] = set()
        self.sums: dict[str, torch.Tensor] = {}

    def wanted(self) -> dict[str, Any]:
        """The entries of the base; those that are packed as twins without data."""
        twins = {name: twin_of(self._value(name), form, device="meta") for name, form in self.formats.items()}
        twins |= {name: self._twin_of_grown(name, device="meta") for name in self._grown}
        return self._base.state_dict() | twins

    def parts(self) -> Iterator[dict[str, Any]]:
        """The entries with data, those of few modules at a time."""
        for names in self._groups():
            part = {name: self._value(name) for name in names}
            packed = [name for name in names if name in self.formats]
            twins = {name: twin_of(part[name], self.formats[name]) for name in packed if name not in self.stored_packed}
            smaller = {name: self._twin_of_grown(name) for name in names if name in self._grown}
            yield (entries := part | twins | smaller)
            entries.clear()  # whoever has read it may hold it until the next is there
            for name in packed:
                self._finish(name, twins.pop(name, None))
            for name in list(smaller):
                twin, value = smaller.pop(name), self._value(name)
                copy_full_(value, F.pad(twin, (0, 0, 0, value.shape[0] - len(twin))).to(local_part(value).device))
        self._base.load_state_dict({name: v for name, v in self._base.state_dict().items() if name not in self.formats})

    def _twin_of_grown(self, name: str, *, device: str = "cpu") -> torch.Tensor:
        value = self._value(name)
        return torch.zeros(self._grown[name], *value.shape[1:], dtype=value.dtype, device=device)

    def _value(self, name: str) -> Any:
        return self._base.state_dict()[name]

    @torch.no_grad()
    def _finish(self, name: str, twin: torch.Tensor | None) -> None:
        form, packed = FORMATS[self.formats[name]], local_part(self._value(name))
        if twin is None:
            self.sums[name] = sums_of(form.unpack(packed, torch.bfloat16))
            return
        self.sums[name] = sums_of(own := local_part(twin))
        try:
            packed.copy_(form.pack(own))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    def _groups(self) -> Iterator[list[str]]:
        """Names in the base's order: those of a module together, as some are stored together."""
        modules: dict[str, list[str]] = {}
        for name in self._base.state_dict():
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        group: list[str] = []
        size = 0
        for names in modules.values():
            own = sum(_twin_bytes(self._value(name), self.formats[name]) for name in names if name in self.formats)
            if size + own > _AT_A_TIME and group:
                yield group
                group, size = [], 0
            group, size = group + names, size + own
        yield group


def twin_of(packed: torch.Tensor, form: str, *, device: torch.device | str | None = None) -> torch.Tensor:
    """An empty dense tensor, bf16, that is sharded as a packed one.

    Args:
        packed: (..., out, blocks, bytes), sharded along experts, rows or blocks.
        device: The packed tensor's if left out.

    Returns:
        (..., out, in).
    """
    dense = FORMATS[form].weight_shape
    own = local_part(packed)
    local = torch.empty(dense(own.shape), dtype=torch.bfloat16, device=device or own.device)
    if not isinstance(packed, DTensor):
        return local
    return with_local(local, packed, dense(packed.shape))


def _twin_bytes(packed: torch.Tensor, form: str) -> int:
    return 2 * math.prod(FORMATS[form].weight_shape(local_part(packed).shape))
