"""Names in step folders: canonical ones, so that a step of one host is read by another.

A run knows its model by the host's names. What it stores is renamed as it is written, and what a step holds as its
metadata are read.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from lora_converter.run.description import OPTIMIZER

_STATE = "state."
_OF_OPTIMIZER = f"{OPTIMIZER}.{_STATE}"


def in_canonical_names(state_dict: Mapping[str, Any], canonical_name: Callable[[str], str]) -> dict[str, Any]:
    """What a step is to hold, model entries beside the states of other parts, as it is written.

    Args:
        canonical_name: A parameter's name in the model -> its name on any host.
    """
    named = {canonical_name(name): value for name, value in state_dict.items()}
    if named.keys() == state_dict.keys():
        return named
    if OPTIMIZER in named:
        state = named[OPTIMIZER].state_dict()
        named[OPTIMIZER] = {_of_state(name, canonical_name): value for name, value in state.items()}
    return named


def _of_state(name: str, rename: Callable[[str], str]) -> str:
    if not name.startswith(_STATE):
        return name
    fqn, dot, value = name.removeprefix(_STATE).rpartition(".")
    return f"{_STATE}{rename(fqn)}{dot}{value}"


class HostNames:
    """The host's names of what step folders hold.

    Args:
        names: Of the model's modules and parameters, on all ranks.
        canonical_name: See `in_canonical_names`.
    """

    def __init__(self, names: Iterable[str], canonical_name: Callable[[str], str]):
        self._known = {canonical_name(name): name for name in names}
        self._differ = any(name != own for name, own in self._known.items())

    def __call__(self, name: str) -> str:
        """Of an adapter's parameter the longest beginning that names a module or a weight is renamed."""
        start = name
        while start:
            if start in self._known:
                return self._known[start] + name[len(start) :]
            start = start[: max(start.rfind("."), start.rfind("_lora"), 0)]
        return name

    def of_step(self, metadata: Metadata) -> Metadata:
        """The metadata of a step folder, by the host's names."""
        if not self._differ:
            return metadata

        def rename(key: str) -> str:
            if key.startswith(_OF_OPTIMIZER):
                return _OF_OPTIMIZER + self(key.removeprefix(_OF_OPTIMIZER))
            return self(key)

        return dataclasses.replace(
            metadata,
            state_dict_metadata={rename(key): value for key, value in metadata.state_dict_metadata.items()},
            storage_data={
                dataclasses.replace(index, fqn=rename(index.fqn)): place
                for index, place in (metadata.storage_data or {}).items()
            },
        )
