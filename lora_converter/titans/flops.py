"""FLOPs of a model most of which is frozen, for the MFU that torchtitan logs.

A trained parameter costs 6 per token: 2 in the forward, 2 for the gradient of the input, 2 for its own. A frozen one
has no gradient of its own, so it costs 4. torchtitan counts 6 for all, and of a packed weight every byte.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn as nn
from torchtitan.tools.logging import logger

from lora_converter.packed_module import shown_unpacked


class _Trained:
    """A model as torchtitan's formulas see one, without its frozen parameters."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (param for _, param in self.named_parameters())

    def children(self) -> Iterator[nn.Module]:
        return iter(())  # asked for embeddings, which are frozen


def flops_not_spent(model: nn.Module, seq_len: int, count: Callable[[Any, int], tuple[int, int]]) -> int:
    """What torchtitan counts too much per token; negative if it counts too little, as of packed weights.

    It counts 2 too many for every frozen parameter that it counts 6 for. Routed experts count as far as they are
    active, and embeddings not at all: its formula is asked with and without the frozen parameters, and the difference
    is what they count for.

    Args:
        count: torchtitan's, of a model and a length: parameters, and FLOPs per token.
    """
    was_disabled, logger.disabled = logger.disabled, True  # the formulas of MoE models log what they count
    try:
        counted = count(model, seq_len)[1]
        with shown_unpacked(model):
            every = count(model, seq_len)[1]
        trained = count(_Trained(model), seq_len)[1]
    finally:
        logger.disabled = was_disabled
    return int(counted - every) + int(every - trained) // 3
