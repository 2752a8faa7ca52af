"""Linears of quantisation-aware training, torchao's: what an adapter on one means.

    y = x̂ Q(W)ᵀ + b + s · (x Aᵀ) Bᵀ        Q rounds to what is to be deployed and back; x̂ is x, or x rounded

The adapter is neither rounded itself nor given the rounded x: it learns beside the quantized base, and belongs beside
it. Merged, it is rounded with the weight, Q(W + s · B A), which is another model.
"""

import logging
from collections.abc import Iterable

import torch.nn as nn

from lora_converter.ranks import is_first_rank

logger = logging.getLogger(__name__)


def is_fake_quantized(module: nn.Module) -> bool:
    """Whether a linear rounds its weight at each call. By name, so that torchao need not be imported."""
    return any(
        cls.__module__.startswith("torchao.") and cls.__name__.endswith("FakeQuantizedLinear")
        for cls in type(module).mro()
    )


def tell_what_merging_means(adapted: Iterable[nn.Module]) -> None:
    """Warns on one rank, if there are such linears, before anything is trained that would be merged later."""
    number = sum(map(is_fake_quantized, adapted))
    if number and is_first_rank():
        logger.warning(
            "LoRA: %d of the linears are fake-quantized: the adapters learn beside the rounded weights. Merged, they "
            "are rounded with the weights, and the outputs are others than in training.",
            number,
        )
