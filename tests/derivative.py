"""A run's gradients against finite differences of its loss: has a backward its forward's mask under dropout?

Where the masks differ, the gradient is that of another function, and off by tens of percent at a dropout of a half.
"""

import math

import torch
import torch.distributed as dist
from harness import Run
from torchtitan.distributed import utils

from lora_converter import adapter_parameters
from lora_converter.names import stable_hash
from lora_converter.tensors import copy_full_, full_tensor


def relative_error(run: Run, *, eps: float = 3e-3) -> float:
    """|numeric - analytic| of the derivative along one random direction in all A and B of all layers, over its size.

    Its size is the standard deviation over the direction's signs: the derivative itself may happen to be near zero.

    A's and B's of lower layers reach the loss through the inputs of higher ones, so those gradients are in it too.
    """
    params = {name: p for part in run.trainer.model_parts for name, p in adapter_parameters(part).items()}
    start = {name: full_tensor(param.detach()).clone() for name, param in params.items()}
    direction = {name: _noise(name, value) for name, value in start.items()}

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for name, param in params.items():
                copy_full_(param, start[name] + distance * direction[name])
        return _forward_backward(run)

    loss_at(0.0)
    all_params = [param for part in run.trainer.model_parts for param in part.parameters()]
    ep_enabled = run.trainer.parallel_dims.ep_enabled
    utils.clip_grad_norm_(all_params, math.inf, ep_enabled=ep_enabled)  # where the trainer's gradients get complete
    products = {n: full_tensor(p.grad) * direction[n] for n, p in params.items() if p.grad is not None}
    mine = {name: (float(product.sum()), float(product.square().sum())) for name, product in products.items()}
    gathered: list[dict[str, tuple[float, float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    stages = {name: sums for part in gathered for name, sums in part.items()}  # of a pipeline
    analytic, variance = (sum(column) for column in zip(*stages.values(), strict=True))
    numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    return abs(numeric - analytic) / math.sqrt(variance)


def _noise(name: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(stable_hash(name))
    return torch.empty(like.shape).normal_(std=like.float().std().item() or 0.05, generator=generator)


def _forward_backward(run: Run) -> float:
    """Step 1's loss, with the masks of step 1, and its gradients."""
    trainer = run.trainer
    trainer.optimizers.zero_grad()
    trainer.checkpointer.run._dropout.continue_after(0)
    trainer.step = 0
    batch, labels = next(trainer.batch_generator(None))
    tokens = torch.tensor(float(labels.numel()))
    mesh = trainer.parallel_dims.get_optional_mesh("batch")
    if mesh is not None:
        dist.all_reduce(tokens, group=mesh.get_group())
    loss = trainer.forward_backward_step(input_dict=dict(batch), labels=labels, global_valid_tokens=tokens)
    loss = full_tensor(loss.detach()).clone().reshape(()).float()
    mesh = trainer.parallel_dims.get_optional_mesh("loss")
    if mesh is not None:
        dist.all_reduce(loss, group=mesh.get_group())
    if trainer.parallel_dims.pp_enabled:  # the stages before the last one log -1, or its sum
        dist.all_reduce(loss, op=dist.ReduceOp.MAX, group=trainer.parallel_dims.get_mesh("pp").get_group())
    return loss.item()
