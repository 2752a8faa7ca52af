"""torchtitan 0.3's trainer as the host of a LoRA run."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn

from lora_converter.hf.naming import StateDictAdapter
from lora_converter.titan03.names import canonical_name
from lora_converter.titans import host


class TitanHost(host.TitanHost):
    """See `titans.host.TitanHost`."""

    def __init__(self, model_parts: list[nn.Module], states: dict[str, Any], adapter: StateDictAdapter | None):
        super().__init__(model_parts, states, adapter, adapter)

    def canonical_name(self, fqn: str) -> str:
        """See `Host.canonical_name`."""
        return canonical_name(fqn)

    def change(self, target: str, make: Callable[[Any], Any]) -> None:
        """See `titans.host.TitanHost.change`."""
        *parts, name = target.split(".")
        owner = functools.reduce(getattr, parts, self.trainer)
        setattr(owner, name, make(getattr(owner, name)))
