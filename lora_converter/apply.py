"""Adapters on a whole model: put them there, freeze the rest, name what trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear, add_adapter, is_linear
from lora_converter.targets import select_targets


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a model's parameters, over its full (unsharded) shapes; a shared parameter counts once."""

    trainable: int
    total: int
    adapted: int
    """Number of linears with an adapter."""


def apply_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, dtype: torch.dtype | None = None
) -> list[LoRALinear]:
    """Puts an adapter on every linear that `config` selects and freezes everything else, in place.

    Adapters of a model with real weights are initialised at once; those on the meta device when `reset_adapters` is
    called after the weights exist.

    Args:
        model: Any module with linears, `nn.Linear` or transformers' `Conv1D`. No name and no value of it changes.
        seed: With a linear's name, decides the adapter's initial values.
        dtype: Dtype of the adapters; that of each linear's weight if left out.

    Returns:
        The adapted linears, in the model's order.

    Raises:
        ValueError: A pattern matches nothing, nothing is selected, or the model has adapters already. The model is
            then as it was.
    """
    if any(True for _ in adapted_linears(model)):
        raise ValueError("The model has LoRA adapters already: apply_lora once, or load another adapter into them.")
    linears = {fqn: module for fqn, module in model.named_modules() if is_linear(module)}
    targets = select_targets(list(linears), targets=config.target_modules, exclude=config.exclude_modules)
    adapted = [add_adapter(linears[fqn], config, fqn=fqn, dtype=dtype) for fqn in targets]
    freeze_base(model)
    for linear in adapted:
        if not linear.weight.is_meta:
            linear.reset_adapter(seed)
    return adapted


def adapted_linears(model: nn.Module) -> Iterator[LoRALinear]:
    """The linears of `model` that have an adapter, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for everything that trains, e.g. `layers.0.attention.wq.lora_a.weight`.

    Names are those of the whole model, also for a pipeline stage or a wrapped or compiled block of it.
    """
    return {
        f"{linear.lora_fqn}.{name}": linear.get_parameter(name)
        for linear in adapted_linears(model)
        for name in linear.adapter_parameter_names
    }


def freeze_base(model: nn.Module) -> None:
    """Sets `requires_grad` so that exactly the adapters train: norms, embeddings and bare parameters are frozen too."""
    model.requires_grad_(False)
    for param in adapter_parameters(model).values():
        param.requires_grad_(True)


def reset_adapters(model: nn.Module, *, seed: int) -> None:
    """Gives every adapter its initial values (see `LoRALinear.reset_adapter`)."""
    for linear in adapted_linears(model):
        linear.reset_adapter(seed)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts what trains and what there is."""
    params = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in params if p.requires_grad),
        total=sum(p.numel() for p in params),
        adapted=sum(1 for _ in adapted_linears(model)),
    )


def merge_adapter(model: nn.Module) -> None:
    """Adds every adapter's update to its base weight, in place, under any layout; the forward then costs the base's.

    Weights that are sharded stay sharded: only the factors, rank-sized, are gathered. Call it on all ranks, between
    steps. The base weights are kept, so it takes their memory once more.

    Raises:
        ValueError: The model has no adapters, or they are merged already.
    """
    linears = adapters_at_rest(model)
    if merged := [linear.lora_fqn for linear in linears if linear.lora_unmerged is not None]:
        raise ValueError(f"{len(merged)} adapters are merged already, {merged[0]} among them: unmerge_adapter first.")
    for linear in linears:
        linear.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """Takes `merge_adapter` back: base weights and adapters are bit for bit what they were.

    Raises:
        ValueError: The model has no adapters, or they are not merged.
    """
    linears = adapters_at_rest(model)
    if apart := [linear.lora_fqn for linear in linears if linear.lora_unmerged is None]:
        raise ValueError(f"{len(apart)} adapters are not merged, {apart[0]} among them: merge_adapter first.")
    for linear in linears:
        linear.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges for good: the adapted linears are plain again, of the class that they were, with the updated weights.

    Call it on all ranks, and not in the middle of a training: optimizers and FSDP2 keep what they know of the factors.

    Returns:
        `model`, which is changed in place.

    Raises:
        ValueError: The model has no adapters.
    """
    for linear in adapters_at_rest(model):
        if linear.lora_unmerged is None:
            linear.merge()
        linear.unload()
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """While it is entered the model computes what its base does, bit for bit: a reference model that costs no memory.

    It may be entered again inside itself, and an exception leaves it as the end does. A compiled model has a graph for
    either state.

    Raises:
        ValueError: The model has no adapters, or they are merged.
    """
    linears = list(adapted_linears(model))
    if not linears:
        raise ValueError("The model has no LoRA adapters.")
    if merged := [linear.lora_fqn for linear in linears if linear.lora_unmerged is not None]:
        raise ValueError(f"{len(merged)} adapters are merged, {merged[0]} among them: unmerge_adapter first.")
    before = [linear.lora_enabled for linear in linears]
    for linear in linears:
        linear.lora_enabled = False
    try:
        yield
    finally:
        for linear, enabled in zip(linears, before, strict=True):
            linear.lora_enabled = enabled


def plain_fqn(fqn: str) -> str:
    """A name without what activation checkpointing and torch.compile put into it."""
    return fqn.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters of FSDP2 in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adapters_at_rest(model: nn.Module) -> list[LoRALinear]:
    """The adapted linears, with their sharded parameters in place: FSDP2 may hold some gathered after a forward.

    Raises:
        ValueError: There is none.
    """
    reshard(model)
    linears = list(adapted_linears(model))
    if not linears:
        raise ValueError("The model has no LoRA adapters.")
    return linears
