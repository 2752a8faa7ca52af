"""From gradients to the optimizer: what stands between torchtitan's and one run on every layout.

1. Under tensor parallelism some of the adapters' gradients are partial sums (`gradients.py`); they are completed before
   clipping. Remove the workaround when the trainer has a hook there.
2. A pipeline stage without adapters has no parameter to optimise and no gradient to take a norm of. Remove when
   `OptimizersContainer` and `clip_grad_norm_` accept a stage that is frozen.
3. torchtitan 0.2.2 divides the loss by the tokens of all data-parallel ranks, so gradients are to be summed over them,
   as it tells FSDP2; its DDP averages them. The mean is multiplied before clipping, and not replaced by a sum in DDP:
   DDP reduces at every micro-batch what has accumulated, and a mean leaves the part that is reduced already as it is.
   Remove when torchtitan sums there too.
4. Under pipeline parallelism that division reaches the logged loss and not the gradients, so that clipping acts on
   gradients as many times too large as the batch has tokens. Remove when the schedule gets the divided loss.

1 and 2 wrap torchtitan's own functions, once and without effect on other models; 3 and 4 act on the converted model's
own run alone.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed._composable.replicate import DDP
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import utils as dist_utils

from lora_converter.apply import adapter_parameters
from lora_converter.gradients import sum_partial_gradients

_RANKS = "_gradient_is_mean_over_ranks"


@functools.cache
def install() -> None:
    """Wraps `clip_grad_norm_`, which the trainer calls once per step, and `OptimizersContainer`."""
    dist_utils.clip_grad_norm_ = _clip_complete_gradients(dist_utils.clip_grad_norm_)
    OptimizersContainer.__init__ = _accept_frozen_stages(OptimizersContainer.__init__)  # type: ignore[method-assign]
    OptimizersContainer._post_init = _post_init  # type: ignore[method-assign]


def mark_mean_gradients(model: nn.Module) -> None:
    """Marks the adapters of a model under DDP, whose gradients are means over the ranks; others are left alone."""
    if isinstance(model, DDP):
        for param in adapter_parameters(model).values():
            setattr(param, _RANKS, dist.get_world_size())  # torchtitan's DDP always spans the world


def _sum_mean_gradients(parameters: list[nn.Parameter]) -> None:
    for param in parameters:
        if param.grad is not None and hasattr(param, _RANKS):
            param.grad.mul_(getattr(param, _RANKS))


def divide_pipeline_gradients(trainer: Any) -> None:
    """Makes the gradients of a pipeline those of the loss per token, as without one. The loss keeps its value."""
    if not trainer.parallel_dims.pp_enabled:
        return
    schedule, run_step = trainer.pp_schedule, trainer.forward_backward_step
    sum_over_tokens = schedule._loss_fn

    @functools.wraps(run_step)
    def run_step_per_token(*, global_valid_tokens: Any, **kwargs: Any) -> torch.Tensor:
        def loss_fn(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = sum_over_tokens(pred, labels)
            return loss.detach() + (loss - loss.detach()) / global_valid_tokens  # the bracket is zero, its gradient not

        schedule._loss_fn = loss_fn
        return run_step(global_valid_tokens=global_valid_tokens, **kwargs)

    trainer.forward_backward_step = run_step_per_token


def _clip_complete_gradients(clip: Any) -> Any:
    @torch.no_grad()
    @functools.wraps(clip)
    def clip_complete(parameters: Iterable[nn.Parameter], *args: Any, **kwargs: Any) -> torch.Tensor:
        parameters = list(parameters)
        sum_partial_gradients(parameters)
        _sum_mean_gradients(parameters)
        if not any(p.grad is not None for p in parameters):
            # A norm of no gradients is a CPU scalar, which NCCL cannot sum over the stages. A zero gradient on the
            # smallest parameter gives a zero norm on the right device and mesh.
            smallest = min(parameters, key=lambda p: p.numel())
            smallest.grad = torch.zeros_like(smallest)
            try:
                return clip(parameters, *args, **kwargs)
            finally:
                smallest.grad = None
        return clip(parameters, *args, **kwargs)

    return clip_complete


def _accept_frozen_stages(init: Any) -> Any:
    @functools.wraps(init)
    def init_container(self: Any, model_parts: Any, optimizer_cls: Any, optimizer_kwargs: Any) -> None:
        def make(params: Any, **kwargs: Any) -> Optimizer:
            return optimizer_cls(_or_empty_group(params), **kwargs)

        init(self, model_parts, make, optimizer_kwargs)

    return init_container


def _post_init(self: Any, all_params: list[nn.Parameter], optimizer_kwargs: dict[str, Any]) -> None:
    Optimizer.__init__(self, _or_empty_group(all_params), optimizer_kwargs)


def _or_empty_group(params: list[nn.Parameter]) -> list[Any]:
    """torch refuses an empty list of parameters, but takes a group that has none."""
    return params or [{"params": []}]
