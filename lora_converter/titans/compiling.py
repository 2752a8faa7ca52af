"""torch.compile in a job: one graph for each kind of layer, torch's limit of them, and how long making them took."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torchtitan.tools.logging import logger

from lora_converter.adapted import AdaptedModule

_LIMIT = torch._dynamo.config.recompile_limit

Kind = tuple[tuple[Any, ...], ...]
"""What a layer's graph is specialised on: names and shapes of parameters, and the settings of its adapters."""


def allow_kinds_of_layers(model: nn.Module, job_config: Any) -> None:
    """Raises torch's limit of graphs per function, which is meant for one kind of layer, to that of the model's kinds.

    torchtitan compiles each layer by itself with `fullgraph`, and all share the function that is compiled: beyond the
    limit its job would end in `FailOnRecompileLimitHit`. Other modes of one kind (validation, disabled adapters) are
    what torch's own limit leaves room for. Process-wide, and only ever raised.
    """
    compile_config, layers = job_config.compile, getattr(model, "layers", None)
    if not (compile_config.enable and "model" in compile_config.components and isinstance(layers, nn.ModuleDict)):
        return
    kinds, config = len({kind_of(layer) for layer in layers.values()}), torch._dynamo.config
    limit = _LIMIT * kinds
    if limit > config.recompile_limit:
        config.recompile_limit = limit
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
        logger.info(f"LoRA: {kinds} kinds of layers by their adapters: torch compiles up to {limit} graphs for them.")


def kind_of(layer: nn.Module) -> Kind:
    """Equal for layers that can run one graph."""
    shapes = ((name, param.shape, param.requires_grad) for name, param in layer.named_parameters())
    adapted = ((name, module) for name, module in layer.named_modules() if isinstance(module, AdaptedModule))
    settings = ((name, repr(module.lora_config)) for name, module in adapted)
    return (*shapes, *settings)


def compiles(config: Any) -> bool:
    """Whether a job's config has anything compiled."""
    return bool(config.compile.enable and config.compile.components)


def first_step_told(train_step: Callable[..., None]) -> Callable[..., None]:
    """A trainer's `train_step`, which says how long the first one took, and how much of that torch spent compiling.

    Graphs are made in the first step of a launch, resumed or not: of forwards where they are first called, of
    backwards after that. torch counts both. The count is this rank's: its step also waits for the other ranks, which in
    a pipeline compile their stages one after another.
    """
    from torch._dynamo.utils import calculate_time_spent

    is_first = True

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any) -> None:
        nonlocal is_first
        if not is_first:
            return train_step(*args, **kwargs)
        is_first = False
        compiled, start = calculate_time_spent()["total_wall_time"], time.perf_counter()
        train_step(*args, **kwargs)
        took, compiled = time.perf_counter() - start, calculate_time_spent()["total_wall_time"] - compiled
        logger.info(f"LoRA: the first step took {took:.1f} s, torch.compile {compiled:.1f} s of it on this rank.")

    return step
