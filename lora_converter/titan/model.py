"""A converted torchtitan model: its class is swapped, so that what the host calls on it reaches the adapters too."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn

from lora_converter.adapters import freeze_base, reset_adapters
from lora_converter.packed_module import shown_unpacked
from lora_converter.run.job import Job
from lora_converter.tensor_parallel import mark_partial_gradients
from lora_converter.titan.optimizer import mark_mean_gradients
from lora_converter.titan.other_converters import check_adapters_are_left
from lora_converter.titan.precision import keep_cast_weights


class LoRAModel(nn.Module):
    """What a converted model's class gains: `init_weights` also initialises the adapters.

    The class is swapped, no method is bound to the instance: pipeline stages are deep copies, and a bound method
    would initialise the original.
    """

    lora_job: Job
    lora_flops_not_spent: int
    """Per token, of those that torchtitan counts for the whole model."""

    lora_adapted: list[str]
    """The modules of the whole model that were given adapters."""

    lora_made_in: float
    """Seconds that the adapters' initial values took."""

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Base first, then the adapters. Freezes again: `SequenceParallel` rebuilds norms as trainable.

        Raises:
            ValueError: See `check_adapters_are_left`.
        """
        check_adapters_are_left(self, self.lora_adapted)
        with shown_unpacked(self):
            cast(Any, super()).init_weights(buffer_device=buffer_device)
        start = time.perf_counter()
        reset_adapters(self, seed=self.lora_job.seed, from_base=False)
        self.lora_made_in = time.perf_counter() - start
        mark_partial_gradients(self)
        mark_mean_gradients(self)
        freeze_base(self)
        freeze_routing(self)
        keep_cast_weights(self)


def is_converted(model_parts: Sequence[nn.Module]) -> bool:
    """Asked of the model and not of its linears: a pipeline stage may have no adapter."""
    return any(isinstance(part, LoRAModel) for part in model_parts)


def lora_model(model_parts: Sequence[nn.Module]) -> LoRAModel:
    """The first part of a converted model."""
    return next(part for part in model_parts if isinstance(part, LoRAModel))


def freeze_routing(model: nn.Module) -> None:
    """Stops the load balancing of MoE layers, which moves the router's `expert_bias` with every optimizer step.

    The bias is part of the base: an adapter that was trained on a moved one would not fit the base it is loaded on.
    torchtitan reads the coefficient when the optimizer is built, after `init_weights`.
    """
    for module in model.modules():
        if getattr(module, "load_balance_coeff", None) is not None:
            cast(Any, module).load_balance_coeff = None
