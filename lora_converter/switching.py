"""Adapters out of the way: disabled for a while, merged and taken back, merged for good, taken off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn

from lora_converter.adapted import AdaptedModule, adapted_modules, adapters_at_rest
from lora_converter.shared import check_not_shared, untie
from lora_converter.trained import unmark_trained


def merge_adapter(model: nn.Module) -> None:
    """Adds every adapter's update to its base weight, in place, under any layout; the forward then costs the base's.

    Weights that are sharded stay sharded: only the factors, rank-sized, are gathered. Call it on all ranks, between
    steps. The base weights are kept, so it takes their memory once more; of updates there is never more than one
    linear's or expert's part on this rank.

    Raises:
        ValueError: The model has no adapters, they are merged already, a weight is quantized, belongs to other modules
            too, or would not be finite. The model is then as it was, as after any other error.
    """
    adapted = adapters_at_rest(model)
    if merged := _merged(adapted):
        raise ValueError(f"{len(merged)} adapters are merged already, {merged[0]} among them: unmerge_adapter first.")
    own = [module for module in adapted if not module.updates_all_owners]
    check_not_shared(model, [f"{module.lora_fqn}.{name}" for module in own for name in module.merged_names()])
    done: list[AdaptedModule] = []
    try:
        for module in adapted:
            module.merge()
            done.append(module)
    except BaseException:
        for module in done:
            module.unmerge()
        raise


def unmerge_adapter(model: nn.Module) -> None:
    """Takes `merge_adapter` back: base weights and adapters are bit for bit what they were.

    Raises:
        ValueError: The model has no adapters, or they are not merged.
    """
    adapted = adapters_at_rest(model)
    if apart := [module.lora_fqn for module in adapted if module.lora_unmerged is None]:
        raise ValueError(f"{len(apart)} adapters are not merged, {apart[0]} among them: merge_adapter first.")
    for module in adapted:
        module.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges for good: the adapted modules are plain again, of the class that they were, with the updated weights.

    Every result is computed, and dropped, before the first is written. A weight that belongs to other modules too, a
    tied output head say, gets a copy of its own, and a transformers model's config says then that nothing is tied.

    Call it on all ranks, and not in the middle of a training: optimizers and FSDP2 keep what they know of the factors.

    Returns:
        `model`, which is changed in place.

    Raises:
        ValueError: The model has no adapters, a weight is quantized, shared and sharded, or would not be finite. The
            model is then as it was.
    """
    adapted = adapters_at_rest(model)
    apart = [module for module in adapted if module.lora_unmerged is None]
    for module in apart:
        module.check_merge()
    own = [module for module in apart if not module.updates_all_owners]
    untie(model, [(module, name) for module in own for name in module.merged_names()])
    for module in adapted:
        if module.lora_unmerged is None:
            module.merge()
        module.unload()
    unmark_trained(model)
    return model


def unload_adapter(model: nn.Module) -> nn.Module:
    """Takes the adapters off: the modules are plain again, with their base weights. Those stay frozen.

    What `train_also` names keeps what it has learned, and is frozen too.

    Returns:
        `model`, which is changed in place, and can be given other adapters.

    Raises:
        ValueError: The model has no adapters.
    """
    for module in adapters_at_rest(model):
        if module.lora_unmerged is not None:
            module.unmerge()
        module.unload()
    unmark_trained(model)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """While it is entered the model computes what its base does, bit for bit: a reference model that costs no memory.

    What `train_also` names has one set of weights and keeps what it has learned. It may be entered again inside itself,
    and an exception leaves it as the end does. A compiled model has a graph for either state.

    Raises:
        ValueError: The model has no adapters, or they are merged.
    """
    adapted = list(adapted_modules(model))
    if not adapted:
        raise ValueError("The model has no LoRA adapters.")
    if merged := _merged(adapted):
        raise ValueError(f"{len(merged)} adapters are merged, {merged[0]} among them: unmerge_adapter first.")
    before = [module.lora_enabled for module in adapted]
    for module in adapted:
        module.lora_enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(adapted, before, strict=True):
            module.lora_enabled = enabled


def _merged(adapted: list[AdaptedModule]) -> list[str]:
    return [module.lora_fqn for module in adapted if module.lora_unmerged is not None]
