"""Adapters that do not train, told once, by name: no gradient, still zero, not finite.

Looked at after the first step of a launch, at every step that is saved, and when the gradient norm that the trainer
logs is not finite: steps at which ranks and devices wait for each other anyhow. The steps between cost nothing.
What one rank sees of a sharded adapter is a part, so the verdict is that of all ranks.
"""

import math
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchtitan.tools.logging import logger

from lora_converter.apply import adapted_linears
from lora_converter.titan.dcp_folder import union_over_ranks

NO_GRADIENT = "got no gradient in the whole step; is their part of the model used?"
ALL_ZERO = "are still zero, so they change nothing; is the learning rate above 0?"
NOT_FINITE = "hold nan or inf"


class FaultWatch:
    """Looks at the adapters of a run between its steps.

    Args:
        trainer: torchtitan's Trainer, whose metrics tell when the gradient norm is not finite.
        model_parts: The models of this rank; several with pipeline stages.
    """

    def __init__(self, trainer: Any, model_parts: list[nn.Module]):
        self._model_parts = model_parts
        self._reported: set[tuple[str, str]] = set()
        self._steps = 0
        self._norm_is_finite = True
        log = trainer.metrics_processor.log

        def log_and_look(step: int, loss: float, max_loss: float, grad_norm: float, **kwargs: Any) -> None:
            self._norm_is_finite = math.isfinite(grad_norm)  # the same on all ranks; losses differ under PP
            log(step, loss, max_loss, grad_norm, **kwargs)

        trainer.metrics_processor.log = log_and_look

    def after_step(self, step: int, *, saves: bool) -> bool:
        """To be called after each step, before the gradients go.

        Args:
            saves: The step is to be saved. On all ranks or none.

        Returns:
            Whether the adapters are finite, as far as was looked.
        """
        self._steps += 1
        suspicious, self._norm_is_finite = not self._norm_is_finite, True
        if not (saves or suspicious or self._steps == 1):
            return True
        linears = {linear.lora_fqn: linear for part in self._model_parts for linear in adapted_linears(part)}
        a = {fqn: linear.lora_a.weight for fqn, linear in linears.items()}
        b = {fqn: linear.lora_b.weight for fqn, linear in linears.items()}
        gradients = {fqn: [p.grad for p in (a[fqn], b[fqn]) if p.grad is not None] for fqn in linears}
        largest_a, largest_b = (_largest({fqn: [p] for fqn, p in factor.items()}) for factor in (a, b))
        self._report(step, NO_GRADIENT, _zero_on_all_ranks(_largest(gradients)))
        if self._steps > 1:
            self._report(step, ALL_ZERO, _zero_on_all_ranks(largest_b))
        finite = {fqn for fqn in linears if math.isfinite(largest_a[fqn]) and math.isfinite(largest_b[fqn])}
        broken = union_over_ranks([fqn for fqn in linears if fqn not in finite])
        self._report(step, NOT_FINITE, broken)
        return not broken

    def _report(self, step: int, fault: str, fqns: list[str]) -> None:
        new = [fqn for fqn in fqns if (fault, fqn) not in self._reported]
        self._reported.update((fault, fqn) for fqn in new)
        if new:
            logger.error(f"LoRA: step {step}: {len(new)} adapters {fault}: {', '.join(new)}.")


def _largest(tensors: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """The largest magnitude in each list of tensors, of this rank's shards: nan if there is one, 0 for no element."""
    parts = [
        (name, local)
        for name, values in tensors.items()
        for value in values
        if (local := value.to_local() if isinstance(value, DTensor) else value).numel()
    ]
    norms = list(torch._foreach_norm([local.detach() for _, local in parts], math.inf)) if parts else []
    found = dict.fromkeys(tensors, 0.0)
    for (name, _), norm in zip(parts, torch.stack(norms).tolist() if norms else [], strict=True):
        found[name] = norm if math.isnan(norm) else max(found[name], norm)
    return found


def _zero_on_all_ranks(largest: dict[str, float]) -> list[str]:
    """Names whose magnitude is zero on every rank that has a part of them."""
    zero = union_over_ranks([name for name, value in largest.items() if value == 0])
    alive = union_over_ranks([name for name in zero if largest.get(name)]) if zero else []
    return [name for name in zero if name not in set(alive)]
