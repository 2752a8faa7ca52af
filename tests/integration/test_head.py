"""A frozen head in torchtitan's trainer: where logits exist, whose loss it is, and that it is the same number."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from harness import BASE_CONFIG, Run, build, finish, parse, train
from tiny_models import MODELS
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer

from lora_converter import adapter_parameters
from lora_converter.titan.head import HeadLoss, without_logits

SCRATCH = "--checkpoint.initial_load_path="
IN_CHUNKS, OVER_LOGITS = "--lora.loss_chunk_tokens=24", "--lora.loss_chunk_tokens=0"
VALIDATION = ("--validation.enable", "--validation.freq=1", "--validation.steps=2", "--validation.dataset=c4_test",
              "--validation.local_batch_size=3", "--validation.seq_len=32")  # fmt: skip
TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))

JOBS = {
    "plain": (),
    "accumulation": ("--training.global_batch_size=8",),
    "compiled": ("--compile.enable", "--compile.components=loss"),
    "tied": tuple(MODELS["qwen3_tied"]),
    "bf16": ("--training.mixed_precision_param=bfloat16",),
    "one chunk": ("--lora.loss_chunk_tokens=-1",),
}


def validated(run: Run) -> list[float]:
    """Trains; returns the validation losses."""
    losses: list[float] = []
    log = run.trainer.metrics_processor.log_validation

    def note(loss: float, step: int) -> None:
        losses.append(loss)
        log(loss=loss, step=step)

    run.trainer.metrics_processor.log_validation = note
    finish(run)
    return losses


@pytest.mark.parametrize("job", JOBS)
def test_losses_and_validation_are_those_over_logits(job: str, tmp_path: Path) -> None:
    options = (SCRATCH, *VALIDATION, f"--validation.dataset_path={parse(tmp_path).training.dataset_path}")
    chunked = build(tmp_path / "chunked", *options, IN_CHUNKS, *JOBS[job])
    plain = build(tmp_path / "plain", *options, *JOBS[job], OVER_LOGITS)
    assert isinstance(chunked.trainer.loss_fn, HeadLoss) and not isinstance(plain.trainer.loss_fn, HeadLoss)
    found, expected = validated(chunked), validated(plain)
    # fp32: sums in another order. bf16: the same products, whose gradients are rounded once more, at their scale.
    tolerance = 1e-3 if job == "bf16" else 1e-6
    assert found == pytest.approx(expected, rel=tolerance) and len(found) == 3
    assert chunked.losses == pytest.approx(plain.losses, rel=tolerance)
    assert chunked.grad_norms == pytest.approx(plain.grad_norms, rel=10 * tolerance)


def test_no_step_makes_a_tensor_of_tokens_times_vocabulary(tmp_path: Path) -> None:
    largest = {}
    for name, chunk in (("chunked", IN_CHUNKS), ("plain", OVER_LOGITS)):
        run = build(tmp_path / name, SCRATCH, chunk)
        tokens = torch.arange(4 * 64).view(4, 64) % 320
        with Largest() as seen:
            step(run, tokens)
        largest[name] = seen.largest
        run.trainer.close()
    widest = 192  # the feed-forward's
    assert largest["plain"] >= 4 * 64 * 320
    assert largest["chunked"] <= max(4 * 64 * widest, 320 * 64), largest


def step(run: Run, tokens: torch.Tensor) -> torch.Tensor:
    count = torch.tensor(float(tokens.numel()))
    return run.trainer.forward_backward_step(input_dict={"input": tokens}, labels=tokens, global_valid_tokens=count)


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_outside_a_step_the_model_gives_logits_and_the_loss_takes_them(tmp_path: Path) -> None:
    """An evaluation calls the model itself, before, between and after steps."""
    run = build(tmp_path, SCRATCH, IN_CHUNKS)
    reference = build(tmp_path / "reference", SCRATCH, OVER_LOGITS)
    for each in (run, reference):
        each.trainer.checkpointer.load()
    for _ in range(2):
        logits = [each.trainer.model_parts[0](TOKENS) for each in (run, reference)]
        assert logits[0].shape == (2, 64, 320) and torch.equal(*logits)
        losses = [each.trainer.loss_fn(pred, TOKENS) for each, pred in zip((run, reference), logits, strict=True)]
        assert torch.equal(*losses)
        step(run, TOKENS)
    with pytest.raises(RuntimeError):
        step(run, TOKENS.float())  # an embedding takes no floats
    assert run.trainer.model_parts[0](TOKENS).shape == (2, 64, 320)
    for each in (run, reference):
        each.trainer.close()


class OwnStep(Trainer):
    """Takes its loss of the model's output itself."""

    def forward_backward_step(self, *, input_dict: Any, labels: Any, global_valid_tokens: Any) -> torch.Tensor:
        pred = self.model_parts[0](input_dict["input"])
        assert pred.shape[-1] == 320, pred.shape
        loss = self.loss_fn(pred, labels) / global_valid_tokens
        loss.backward()
        return loss


def own_loss(job_config: Any, **kwargs: Any) -> Callable[..., torch.Tensor]:
    def loss(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert pred.shape[-1] == 320
        return pred.square().sum()

    return loss


def test_a_loss_that_is_put_on_the_trainer_afterwards_gets_logits(tmp_path: Path) -> None:
    run = build(tmp_path, SCRATCH, IN_CHUNKS)
    run.trainer.loss_fn = own_loss(None)
    assert step(run, TOKENS).isfinite()
    run.trainer.close()


def test_a_step_without_any_label_leaves_the_adapters_finite(tmp_path: Path) -> None:
    """1 / tokens is infinite then; torchtitan's cross-entropy has gradients of zero."""
    run = build(tmp_path, SCRATCH, IN_CHUNKS)
    none = torch.full_like(TOKENS, -100)
    run.trainer.forward_backward_step(input_dict={"input": TOKENS}, labels=none, global_valid_tokens=torch.tensor(0.0))
    gradients = [param.grad for param in adapter_parameters(run.trainer.model_parts[0]).values()]
    assert gradients and not any(gradient.any() for gradient in gradients)
    run.trainer.close()


def test_a_head_with_a_bias_gives_the_loss_over_logits() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 16).requires_grad_(False), torch.randn(2, 5, 8, requires_grad=True)
    labels = torch.randint(0, 16, (2, 5))
    job = SimpleNamespace(compile=SimpleNamespace(enable=False), lora=SimpleNamespace(loss_chunk_tokens=3))
    loss = HeadLoss(SimpleNamespace(loss_fn=None, job_config=job, parallel_dims=SimpleNamespace(tp=1)), head)
    with without_logits([SimpleNamespace(output=head)]):
        found = loss(head(hidden), labels)
    torch.testing.assert_close(found, cross_entropy_loss(head(hidden), labels), rtol=1e-6, atol=1e-6)


def with_a_hook(model_cls: Any) -> type:
    class WithAHook(model_cls):
        def __init__(self, model_args: Any):
            super().__init__(model_args)
            self.output.register_forward_hook(lambda module, args, out: None)

    return WithAHook


REASONS = {
    "lora.loss_chunk_tokens = 0": (OVER_LOGITS,),
    "the output head has an adapter": ("--lora.target_modules=all-linear,output",),
    "the output head is a FrozenFloat8Linear[Float8Linear], which has a product of its own": (
        *("--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate"),
        "--quantize.linear.float8.recipe_name=rowwise",
    ),
    "the model has a loss of its own": ("--model.name=llama3_with_a_loss",),
    "the output head has a forward hook": ("--model.name=llama3_with_a_hook",),
    "OwnStep has a step of its own": (),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_needs_logits_gets_them_and_the_log_says_why(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "llama3_with_a_loss" in "".join(REASONS[reason]):
        spec = dataclasses.replace(get_train_spec("llama3"), build_loss_fn=own_loss)
        register_train_spec("llama3_with_a_loss", spec)
    if "llama3_with_a_hook" in "".join(REASONS[reason]):
        spec = get_train_spec("llama3")
        register_train_spec("llama3_with_a_hook", dataclasses.replace(spec, model_cls=with_a_hook(spec.model_cls)))
    if reason.startswith("OwnStep"):
        monkeypatch.setattr("harness.Trainer", OwnStep)
    caplog.set_level("INFO")
    run = train(tmp_path, SCRATCH, *REASONS[reason])
    assert f"torchtitan's loss, over all logits: {reason}." in caplog.text
    assert not isinstance(run.trainer.loss_fn, HeadLoss) and len(run.losses) == 3


def test_a_validator_with_a_loss_of_its_own_gets_logits(tmp_path: Path) -> None:
    run = build(tmp_path, SCRATCH, *VALIDATION, f"--validation.dataset_path={parse(tmp_path).training.dataset_path}")
    run.trainer.validator.loss_fn = own_loss(None)  # which looks at the shape
    assert len(validated(run)) == 3


def test_full_fine_tuning_keeps_torchtitans_loss(tmp_path: Path) -> None:
    run = build(tmp_path, SCRATCH, config=BASE_CONFIG)
    assert not isinstance(run.trainer.loss_fn, HeadLoss)
    run.trainer.close()


@pytest.mark.parametrize("value", ["-2", "1.5"])
def test_a_size_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, SystemExit)):
        parse(tmp_path, f"--lora.loss_chunk_tokens={value}")
