"""Validation on conversations: the mean loss over all trained tokens, of the same rows at every visit.

torchtitan's own validator has its text loader built in and takes a mean of means, doubled under context parallelism.
Here each rank sums its losses and its trained tokens, and the sums are divided once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn as nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils

from lora_converter.tensors import full_tensor
from lora_converter.titan.head import without_logits
from lora_converter.titans.chat import Batch


class ChatValidator(Validator):
    """torchtitan's validator, over conversations.

    Args:
        batches: Those of this rank, from the beginning at each call; as many on every rank.
        the rest: As torchtitan's trainer gives them to a validator.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Batch]],
        *,
        job_config: Any,
        parallel_dims: Any,
        loss_fn: Callable[..., torch.Tensor],
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: Any,
        tokenizer: Any = None,
        pp_schedule: Any = None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
        **_: Any,
    ):
        BaseValidator.__init__(self, job_config)
        self._batches, self._loss_fn, self._metrics = batches, loss_fn, metrics_processor
        self.tokenizer, self.parallel_dims = tokenizer, parallel_dims
        self._context, self._amp = validation_context, maybe_enable_amp
        self._schedule, self._first, self._last = pp_schedule, pp_has_first_stage, pp_has_last_stage

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs the mean loss over the trained tokens of all rows."""
        device = utils.device_type
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, trained tokens
        for model in model_parts:
            model.eval()
        with without_logits(model_parts):
            for inputs, labels in self._batches():
                self._metrics.ntokens_since_last_log += labels.numel()
                moved = {name: value.to(device) for name, value in inputs.items()}
                loss, trained = self._loss(model_parts, moved, labels.to(device))
                sums += torch.stack([full_tensor(loss).to(sums), trained.to(sums)])
        for model in model_parts:
            model.train()
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            total, tokens = (dist_utils.dist_sum(value, mesh) for value in sums)
        else:
            total, tokens = sums.tolist()
        self._metrics.log_validation(loss=total / tokens if tokens else float("nan"), step=step)

    def _loss(
        self, model_parts: list[nn.Module], inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses of this rank's part of a batch, and how many tokens it is over."""
        tokens, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(inputs, labels, model_parts)
        trained = (labels != IGNORE_INDEX).sum()
        with self._context():
            if not self.parallel_dims.pp_enabled:
                with self._amp:
                    return self._loss_fn(model_parts[0](tokens, **extra_inputs, **extra_kwargs), labels), trained
            losses: list[torch.Tensor] = []
            target = dict(target=labels, losses=losses) if self._last else dict(target=None, losses=None)
            first = (tokens,) if self._first else ()
            self._schedule.eval(*first, **(extra_inputs if self._first else {}), **extra_kwargs, **target)
        return torch.stack(losses).sum() if self._last else torch.zeros(()), trained
