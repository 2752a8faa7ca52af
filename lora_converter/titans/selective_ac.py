"""Selective activation checkpointing keeps of a model with adapters what it keeps of the model without.

torchtitan's op-SAC keeps the results of some operators and of every second `aten.mm`, in the order of the forward. An
adapted or packed linear is one operator of ours (`ops.py`, `packed_ops.py`), which that policy does not know: it would
recompute all of them. So the policy is asked about the base's product instead, which it counts, and keeps or not, as
without the adapter.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from lora_converter.packed_module import shown_unpacked
from lora_converter.packed_ops import as_product


def count_as_products(create_contexts: Callable[..., Any]) -> Callable[..., Any]:
    """`create_selective_checkpoint_contexts`, for policies that know matrix products; lists of operators are left."""

    @functools.wraps(create_contexts)
    def create(policy_fn_or_list: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(policy_fn_or_list):
            policy_fn_or_list = asked_about_products(policy_fn_or_list)
        return create_contexts(policy_fn_or_list, *args, **kwargs)

    return create


def asked_about_products(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy that is asked about the base's product in place of our operator."""
    return lambda ctx, func, *args, **kwargs: policy(ctx, *as_product(func, args), **kwargs)


def ask_about_products(model: nn.Module) -> None:
    """Lets what is checkpointed in a model ask its policies so, in place; before the first forward."""
    for module in model.modules():
        if isinstance(module, CheckpointWrapper) and "context_fn" in module.checkpoint_fn.keywords:
            contexts = _asking(module.checkpoint_fn.keywords["context_fn"])
            module.checkpoint_fn = functools.partial(module.checkpoint_fn, context_fn=contexts)


def _asking(create_contexts: Callable[[], Any]) -> Callable[[], Any]:
    def create() -> Any:
        modes = create_contexts()
        for mode in modes:
            if policy := getattr(mode, "policy_fn", None):  # of the mode that decides, and not of that which looks up
                mode.policy_fn = asked_about_products(policy)
        return modes

    return create


def shapes_of_packed(apply_op_sac: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`_apply_op_sac`, which reads the shapes of weights whose products are to be recomputed."""

    @functools.wraps(apply_op_sac)
    def apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with shown_unpacked(module):
            return apply_op_sac(module, *args, **kwargs)

    return apply
