"""From gradients to the optimizer: what stands between torchtitan's and one run on every layout.

1. Under tensor parallelism some of the adapters' gradients are partial sums (`tensor_parallel.py`); they are completed
   before clipping.
2. A pipeline stage without adapters has no parameter to optimise and no gradient to take a norm of.
3. torchtitan 0.2.2 divides the loss by the tokens of all data-parallel ranks, so gradients are to be summed over them,
   as it tells FSDP2; its DDP averages them. The mean is multiplied before clipping, and not replaced by a sum in DDP:
   DDP reduces at every micro-batch what has accumulated, and a mean leaves the part that is reduced already as it is.
   Remove when torchtitan sums there too.
4. Under pipeline parallelism that division reaches the logged loss and not the gradients, so that clipping acts on
   gradients as many times too large as the batch has tokens.

5. What `train_also` names, and rows of tokens, are a second group, with a rate of its own and no weight decay.

1, 2 and 5 are rows of `host_changes.py` without effect on other models, 3 and 4 act on the converted model's own run
alone; the table says when each can go.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed._composable.replicate import DDP
from torch.optim import Optimizer

from lora_converter.adapted import adapter_parameters
from lora_converter.tensor_parallel import sum_partial_gradients
from lora_converter.titan.installed import change_trainer
from lora_converter.titans.optimizer import split_group

_RANKS = "_gradient_is_mean_over_ranks"


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
    schedule = trainer.pp_schedule
    sum_over_tokens = schedule._loss_fn

    def per_token(run_step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(run_step)
        def run_step_per_token(*, global_valid_tokens: Any, **kwargs: Any) -> torch.Tensor:
            def loss_fn(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                loss = sum_over_tokens(pred, labels)
                # The bracket is zero, its gradient is not.
                return loss.detach() + (loss - loss.detach()) / global_valid_tokens

            schedule._loss_fn = loss_fn
            return run_step(global_valid_tokens=global_valid_tokens, **kwargs)

        return run_step_per_token

    change_trainer(trainer, "forward_backward_step", per_token)


def clip_complete_gradients(clip: Any) -> Any:
    """`clip_grad_norm_`, which the trainer calls once per step, on gradients that are complete."""

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


def accept_frozen_stages(init: Any) -> Any:
    """`OptimizersContainer.__init__`, which makes an optimizer for each stage."""

    @functools.wraps(init)
    def init_container(self: Any, model_parts: Any, optimizer_cls: Any, optimizer_kwargs: Any) -> None:
        def make(params: Any, **kwargs: Any) -> Optimizer:
            return optimizer_cls(split_group(model_parts, {"params": params, "lr": kwargs["lr"]}), **kwargs)

        init(self, model_parts, make, optimizer_kwargs)

    return init_container


def accept_frozen_models(post_init: Any) -> Any:
    """`OptimizersContainer._post_init`, which makes the container an optimizer of all parameters."""

    @functools.wraps(post_init)
    def init_optimizer(self: Any, all_params: list[nn.Parameter], optimizer_kwargs: dict[str, Any]) -> None:
        Optimizer.__init__(self, _or_empty_group(all_params), optimizer_kwargs)

    return init_optimizer


def _or_empty_group(params: list[nn.Parameter]) -> list[Any]:
    """torch refuses an empty list of parameters, but takes a group that has none."""
    return params or [{"params": []}]
