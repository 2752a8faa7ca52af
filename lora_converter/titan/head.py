"""The loss of a frozen head without logits, in torchtitan's trainer (the mathematics: `frozen_head.py`).

While the trainer runs a step or a validation, a head that does not train hands on its input, and the loss does the
head's work. Everywhere else the model gives logits, as before: who calls it for an evaluation sees no difference.

The head stays a module that is called: FSDP2 gathers and frees its weight by hooks, and tensor parallelism gathers
its input by one. Only the hook that lays out logits over the vocabulary has to leave hidden states alone.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.tools.logging import logger

from lora_converter.adapted import AdaptedModule
from lora_converter.frozen_head import default_chunk_tokens, frozen_head_loss
from lora_converter.new_tokens import rows_of_tokens
from lora_converter.swap import swap_class, unswapped
from lora_converter.tensors import local_part
from lora_converter.titan.installed import change_trainer


class SkippableHead(nn.Linear):
    """An output head that can hand on its input in place of logits.

    Attributes:
        skipped: Whether it does.
        handed_on: What it handed on last, and its version, until the loss has asked.
    """

    skipped: bool
    handed_on: tuple[torch.Tensor, int] | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, or `input` as it is."""
        if not self.skipped:
            return super().forward(input)
        self.handed_on = input, local_part(input)._version
        return input

    def check_is_handed_on(self, pred: torch.Tensor) -> None:
        """Raises ValueError unless `pred` is what was handed on, unchanged: logits that a model caps or scales, say."""
        handed_on, self.handed_on = self.handed_on, None
        if handed_on is not None:
            ours, given = local_part(handed_on[0]), local_part(pred)
            same = given.data_ptr() == ours.data_ptr() and given.shape == ours.shape and given._version == handed_on[1]
        if handed_on is None or not same:
            raise ValueError(
                "The model changes what its output head gives, which the loss of a frozen head cannot follow. Set "
                "lora.loss_chunk_tokens = 0."
            )


@contextmanager
def without_logits(model_parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within, heads that can be skipped are. For what ends in the trainer's own loss."""
    outputs = [getattr(part, "output", None) for part in model_parts]
    heads = [head for head in outputs if isinstance(head, SkippableHead)]
    for head in heads:
        head.skipped = True
    try:
        yield
    finally:
        for head in heads:
            head.skipped = False


def validate_without_logits(validate: Callable[..., Any]) -> Callable[..., Any]:
    """`Validator.validate`, which calls the model for its loss alone. A loss of the user's gets its logits."""

    @functools.wraps(validate)
    def validate_skipping(self: Any, model_parts: list[nn.Module], step: int) -> Any:
        with without_logits(model_parts if isinstance(self.loss_fn, HeadLoss) else ()):
            return validate(self, model_parts, step)

    return validate_skipping


def skip_logits(trainer: Any) -> None:
    """Lets the trainer's loss do the work of a head that does not train, in chunks; says so, or why not.

    On every pipeline stage: the last one has the head.
    """
    head = next((part.output for part in trainer.model_parts if getattr(part, "output", None) is not None), None)
    if head is None:
        return
    if reason := _reason_for_logits(trainer, head):
        logger.info(f"LoRA: torchtitan's loss, over all logits: {reason}.")
        return
    loss = HeadLoss(trainer, head)
    change_trainer(trainer, "loss_fn", lambda _: loss)
    if trainer.parallel_dims.pp_enabled:
        change_trainer(trainer, "pp_schedule._loss_fn", lambda _: loss)

    def skipping(run_step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(run_step)
        def run_step_skipping(**kwargs: Any) -> torch.Tensor:
            with without_logits(trainer.model_parts if isinstance(trainer.loss_fn, HeadLoss) else ()):
                return run_step(**kwargs)

        return run_step_skipping

    change_trainer(trainer, "forward_backward_step", skipping)
    logger.info(f"LoRA: the loss takes the frozen output head, {loss.chunk_tokens:,} tokens at a time.")


def _reason_for_logits(trainer: Any, head: nn.Module) -> str:
    """Why the head cannot be skipped; empty if it can."""
    if trainer.job_config.lora.loss_chunk_tokens == 0:
        return "lora.loss_chunk_tokens = 0"
    if trainer.train_spec.build_loss_fn is not build_cross_entropy_loss:
        return "the model has a loss of its own"
    host = importlib.util.find_spec("torchtitan.train")  # not its class, which is another one in `__main__`
    assert host is not None
    step = vars(trainer).get("forward_backward_step", type(trainer).forward_backward_step)
    if getattr(getattr(step, "__code__", None), "co_filename", "") != host.origin:
        return f"{type(trainer).__name__} has a step of its own"
    rows = rows_of_tokens(head)
    if isinstance(head, AdaptedModule) and rows is None:
        return "the output head has an adapter"
    if any(param.requires_grad for param in head.parameters() if rows is None or param is not rows.lora_token_rows):
        return "the output head is trained"
    if _linear_class(head) is not nn.Linear:
        return f"the output head is a {_linear_class(head).__name__}, which has a product of its own"
    if any(not _is_of_torch(hook) for hook in head._forward_hooks.values()):
        return "the output head has a forward hook"
    if trainer.parallel_dims.tp_enabled and not _is_sharded_over_vocabulary(head.weight):
        return "tensor parallelism does not shard the output head over the vocabulary"
    return ""


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _is_sharded_over_vocabulary(weight: Any) -> bool:
    if not isinstance(weight, DTensor):
        return False
    placements = dict(zip(weight.device_mesh.mesh_dim_names or (), weight.placements, strict=False))
    return placements.get("tp") == Shard(0)


def _linear_class(head: nn.Module) -> type:
    """The head's class before FSDP2 came."""
    cls = next(cls for cls in type(head).__mro__ if not issubclass(cls, FSDPModule))
    return cls if rows_of_tokens(head) is None else unswapped(cls)


class HeadLoss:
    """torchtitan's cross-entropy, the sum over labels: of logits, or of what a skipped head hands on.

    Attributes:
        chunk_tokens: As `frozen_head_loss` takes it.
    """

    def __init__(self, trainer: Any, head: nn.Module):
        self._of_logits = trainer.loss_fn
        compiled = trainer.job_config.compile
        self._backend = compiled.backend if compiled.enable and "loss" in compiled.components else ""
        self._head = swap_class(head, SkippableHead)
        self._head.skipped, self._head.handed_on = False, None
        _leave_hidden_states_alone(self._head)
        rows = -(-self._head.out_features // trainer.parallel_dims.tp)
        chosen = trainer.job_config.lora.loss_chunk_tokens
        self.chunk_tokens: int = chosen if chosen > 0 else default_chunk_tokens(rows)

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See the class.

        Args:
            pred: [rows, tokens, vocabulary or width].
            labels: [rows, tokens].
        """
        if not self._head.skipped:
            return self._of_logits(pred, labels)
        self._head.check_is_handed_on(pred)
        with _gathered(self._head) as (weight, bias):
            bias = None if bias is None else local_part(bias)
            options: dict[str, Any] = dict(chunk_tokens=self.chunk_tokens, bias=bias)
            rows = rows_of_tokens(self._head)
            if rows is not None and rows.is_active:
                options["columns"], options["added"] = rows.columns()
            if not isinstance(weight, DTensor):
                return frozen_head_loss(pred, weight, labels, compile_backend=self._backend, **options)
            mesh = weight.device_mesh
            _, (first_row, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
            assert isinstance(pred, DTensor)
            pred = pred.to_local(grad_placements=[Partial()])
            options.update(first_row=first_row, group=mesh.get_group())
            return frozen_head_loss(pred, local_part(weight), labels, **options)


@contextmanager
def _gathered(head: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The head's parameters without FSDP2's shards. The backward frees them; without one they go at the end."""
    found = head.weight
    if isinstance(head, FSDPModule):
        head.unshard()
    try:
        yield head.weight, head.bias
    finally:
        if isinstance(head, FSDPModule) and head.weight is not found and not torch.is_grad_enabled():
            head.reshard()


def _leave_hidden_states_alone(head: SkippableHead) -> None:
    """Tensor parallelism lays out over the vocabulary what the head gives; hidden states have no such dimension."""
    for number, hook in head._forward_hooks.items():
        if hook.__module__.startswith("torch.distributed.tensor"):
            head._forward_hooks[number] = functools.partial(_unless_skipped, hook)


def _unless_skipped(hook: Callable[..., Any], head: SkippableHead, inputs: Any, output: Any) -> Any:
    return output if head.skipped else hook(head, inputs, output)
