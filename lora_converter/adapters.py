"""Adapters on a whole model: put them there, freeze the rest, name what trains."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from lora_converter.adapted import AdaptedModule, adapted_modules, adapter_parameters, adapters_at_rest
from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear, add_adapter, is_linear
from lora_converter.targets import select_targets
from lora_converter.tensor_parallel import LoRAFactor


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a model's parameters, over its full (unsharded) shapes; a shared parameter counts once."""

    trainable: int
    total: int
    adapted: int
    """Number of modules with an adapter."""

    kinds: dict[str, int] = field(default_factory=dict)
    """The same by kind: `{"linears": 224}`."""


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    canonical_name: Callable[[str], str] = str,
    factor_class: type[LoRAFactor] = LoRAFactor,
) -> list[LoRALinear]:
    """Puts an adapter on every linear that `config` selects and freezes everything else, in place.

    Adapters of a model with real weights are initialised at once; those on the meta device when `reset_adapters` is
    called after the weights exist.

    Args:
        model: Any module with linears, `nn.Linear` or transformers' `Conv1D`. No name and no value of it changes.
        seed: With a linear's canonical name, decides the adapter's initial values.
        dtype: Dtype of the adapters; that of each linear's weight if left out.
        canonical_name: A linear's name in this model -> its name on any host; the same if left out.
        factor_class: What A and B are made of; a host may need more of them.

    Returns:
        The adapted linears, in the model's order.

    Raises:
        ValueError: A pattern matches nothing, nothing is selected, or the model has adapters already. The model is
            then as it was.
    """
    if any(True for _ in adapted_modules(model)):
        raise ValueError("The model has LoRA adapters already: apply_lora once, or load another adapter into them.")
    linears = {fqn: module for fqn, module in model.named_modules() if is_linear(module)}
    targets = select_targets(list(linears), targets=config.target_modules, exclude=config.exclude_modules)
    adapted = [
        add_adapter(
            linears[fqn],
            config,
            fqn=fqn,
            canonical_name=canonical_name(fqn),
            dtype=dtype,
            factor_class=factor_class,
        )
        for fqn in targets
    ]
    freeze_base(model)
    for linear in adapted:
        if not linear.weight.is_meta:
            linear.reset_adapter(seed)
    return adapted


def freeze_base(model: nn.Module) -> None:
    """Sets `requires_grad` so that exactly the adapters train: norms, embeddings and bare parameters are frozen too."""
    model.requires_grad_(False)
    for param in adapter_parameters(model).values():
        param.requires_grad_(True)


def reset_adapters(model: nn.Module, *, seed: int) -> None:
    """Gives every adapter its initial values (see `AdaptedModule.reset_adapter`)."""
    for module in adapted_modules(model):
        module.reset_adapter(seed)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts what trains and what there is."""
    params = list(model.parameters())
    kinds = Counter(module.adapter_kind for module in adapted_modules(model))
    return ParameterCount(
        trainable=sum(p.numel() for p in params if p.requires_grad),
        total=sum(p.numel() for p in params),
        adapted=kinds.total(),
        kinds=dict(kinds),
    )


def merge_adapter(model: nn.Module) -> None:
    """Adds every adapter's update to its base weight, in place, under any layout; the forward then costs the base's.

    Weights that are sharded stay sharded: only the factors, rank-sized, are gathered. Call it on all ranks, between
    steps. The base weights are kept, so it takes their memory once more.

    Raises:
        ValueError: The model has no adapters, or they are merged already.
    """
    adapted = adapters_at_rest(model)
    if merged := _merged(adapted):
        raise ValueError(f"{len(merged)} adapters are merged already, {merged[0]} among them: unmerge_adapter first.")
    for module in adapted:
        module.merge()


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

    Call it on all ranks, and not in the middle of a training: optimizers and FSDP2 keep what they know of the factors.

    Returns:
        `model`, which is changed in place.

    Raises:
        ValueError: The model has no adapters.
    """
    for module in adapters_at_rest(model):
        if module.lora_unmerged is None:
            module.merge()
        module.unload()
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """While it is entered the model computes what its base does, bit for bit: a reference model that costs no memory.

    It may be entered again inside itself, and an exception leaves it as the end does. A compiled model has a graph for
    either state.

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
