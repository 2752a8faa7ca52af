"""A model of torchtitan's with adapters: its class is swapped, so that what the host calls on it reaches them too."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch.nn as nn

from lora_converter.adapters import ParameterCount, freeze_base, reset_adapters
from lora_converter.config import LoRAConfig
from lora_converter.experts import LoRAExperts
from lora_converter.figures import percent, short
from lora_converter.packed_module import shown_unpacked
from lora_converter.run.job import Job
from lora_converter.tensor_parallel import mark_partial_gradients


class LoRAModel(nn.Module):
    """What the class of a model with adapters gains: `init_weights` also initialises the adapters.

    The class is swapped, no method is bound to the instance: pipeline stages are deep copies, and a bound method
    would initialise the original.
    """

    lora_job: Job
    lora_made_in: float
    """Seconds that the adapters' initial values took."""

    def init_weights(self, **kwargs: Any) -> None:
        """Base first, then the adapters. Freezes again: what shards a model rebuilds parameters as trainable."""
        with shown_unpacked(self):
            cast(Any, super()).init_weights(**kwargs)
        start = time.perf_counter()
        reset_adapters(self, seed=self.lora_job.seed, from_base=False)
        self.lora_made_in = time.perf_counter() - start
        mark_partial_gradients(self)
        freeze_base(self)
        freeze_routing(self)


def is_converted(model_parts: Sequence[nn.Module]) -> bool:
    """Asked of the model and not of its linears: a pipeline stage may have no adapter."""
    return any(isinstance(part, LoRAModel) for part in model_parts)


def lora_model(model_parts: Sequence[nn.Module]) -> Any:
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


def describe(count: ParameterCount, config: LoRAConfig) -> str:
    """One log line with counts."""
    adapted = " and ".join(f"{number} {kind}" for kind, number in count.kinds.items())
    ranks = {LoRAExperts.adapter_kind: config.expert_rank or config.rank}
    told = " and ".join(dict.fromkeys(str(ranks.get(kind, config.rank)) for kind in count.kinds))
    in_full = f", {count.in_full} modules trained in full" if count.in_full else ""
    return (
        f"LoRA: {adapted} adapted (rank {told}, alpha {config.alpha:g}){in_full}, "
        f"{short(count.trainable)} of {short(count.total)} parameters train "
        f"({percent(count.trainable / count.total, 2)})"
    )
