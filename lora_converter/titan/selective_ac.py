"""Selective activation checkpointing keeps of a model with adapters what it keeps of the model without.

torchtitan's op-SAC keeps the results of some operators and of every second `aten.mm`, in the order of the forward. An
adapted linear is one operator of ours (`ops.py`), which that policy does not know: it would recompute all of them. So
the policy is asked about the base's product instead, which it counts, and keeps or not, as without the adapter.
"""

import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from lora_converter.ops import as_plain_product


def count_as_products(model: nn.Module) -> None:
    """Translates for the policies of all selectively checkpointed blocks of `model`. Call when they are wrapped."""
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            options = module.checkpoint_fn.keywords
            if "context_fn" in options:
                options["context_fn"] = _translated(options["context_fn"])


def _translated(context_fn):  # type: ignore[no-untyped-def]
    def contexts():  # type: ignore[no-untyped-def]
        modes = context_fn()
        for mode in modes:  # before torch 2.13 the mode of the recomputation asked the policy once more
            if getattr(mode, "policy_fn", None) is not None:
                mode.policy_fn = _asked_about_products(mode.policy_fn)
        return modes

    return contexts


def _asked_about_products(policy):  # type: ignore[no-untyped-def]
    return lambda ctx, func, *args, **kwargs: policy(ctx, *as_plain_product(func, args), **kwargs)
