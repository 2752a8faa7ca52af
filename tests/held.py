"""What a trainer holds from one step to the next."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def held(trainer: Any) -> dict[str, int]:
    """Bytes of this rank after a step."""
    params = [param for part in trainer.model_parts for param in part.parameters()]
    trained = [param for param in params if param.requires_grad]
    states = [state for optimizer in trainer.optimizers.optimizers for state in optimizer.state.values()]
    return {
        "base": _bytes(param for param in params if not param.requires_grad),
        "trained": _bytes(trained),
        "gradients": _bytes(param.grad for param in trained if param.grad is not None),
        "optimizer": _bytes(value for state in states for value in state.values()),
    }


def _bytes(values: Iterable[torch.Tensor]) -> int:
    """Of storages, each counted once."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in local}.values())
