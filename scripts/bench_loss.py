"""`bench.py loss`: forward and backward of the loss of a frozen head, in chunks and over all logits.

The peers are what a trainer runs. torchtitan's cross-entropy follows a head that is never compiled, and may be compiled
itself; ours takes the head's products too, and what it does to a chunk's logits may be compiled.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from bench_measure import allocated, paired, ratio

from lora_converter.frozen_head import IGNORED, default_chunk_tokens, frozen_head_loss

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states [1, tokens, width] and labels [1, tokens] -> the sum of the cross-entropies."""

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""-> the mean, and the hidden states' gradient."""


def loss_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per dtype, shape, part of the labels that is ignored, and peer."""
    return [
        {"dtype": dtype, "width": width, "vocabulary": options.vocabulary, "tokens": tokens, "ignored": ignored, **row}
        for dtype in options.dtypes
        for width in options.widths or [1024]
        for tokens in options.tokens or [2048]
        for ignored in (0.0, 0.8)
        for row in _peers(getattr(torch, dtype), width, tokens, ignored, options)
    ]


def _peers(
    dtype: torch.dtype, width: int, tokens: int, ignored: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # each shape is compiled as the only one, as it is in a job
    like: dict[str, Any] = dict(dtype=dtype, device=options.device)
    hidden = torch.randn(1, tokens, width, **like).requires_grad_()
    weight = torch.randn(options.vocabulary, width, **like) / width**0.5
    labels = torch.randint(options.vocabulary, (1, tokens), device=options.device)
    labels[:, : round(ignored * tokens)] = IGNORED
    labels = labels[:, torch.randperm(tokens, device=options.device)]
    chunk = options.chunk_tokens or default_chunk_tokens(options.vocabulary)

    losses = _losses(weight, chunk)
    steps = {name: _forward_backward(loss, hidden, labels) for name, loss in losses.items()}
    _same(steps)
    peaks = {}
    for name, step in steps.items():
        with allocated(options.device) as memory:
            step()
        peaks[name] = memory.peak
    timed = {**steps, "products alone": _products(hidden.detach()[0], weight)}
    times = paired(timed, options.rounds, options.seconds)
    return [
        {
            "chunk": chunk,
            "peer": name,
            "ms": 1e3 * statistics.median(times[name]),
            "time/torchtitan": ratio(times, name, "torchtitan"),
            **({"peak_MB": peaks[name] / 1e6} if name in peaks else {}),
        }
        for name in timed
    ]


def _losses(weight: torch.Tensor, chunk_tokens: int) -> dict[str, Loss]:
    from torchtitan.components.loss import cross_entropy_loss

    def over_all_logits(loss: Loss) -> Loss:
        return lambda hidden, labels: loss(F.linear(hidden, weight), labels)

    def in_chunks(backend: str) -> Loss:
        return lambda hidden, labels: frozen_head_loss(
            hidden, weight, labels, chunk_tokens=chunk_tokens, compile_backend=backend
        )

    return {
        "torchtitan": over_all_logits(cross_entropy_loss),
        "torchtitan compiled": over_all_logits(torch.compile(cross_entropy_loss)),
        "ours": in_chunks(""),
        "ours compiled": in_chunks("inductor"),
    }


def _forward_backward(loss: Loss, hidden: torch.Tensor, labels: torch.Tensor) -> Step:
    trained = int((labels != IGNORED).sum())

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        mean = loss(hidden, labels) / trained
        (gradient,) = torch.autograd.grad(mean, hidden)
        return mean.detach(), gradient

    return step


def _same(steps: dict[str, Step]) -> None:
    """Runs each step, and stops where one does not compute what torchtitan's does."""
    loss, gradient = steps["torchtitan"]()
    bound = max(5 * torch.finfo(gradient.dtype).eps, 1e-4)  # of some roundings; what is wrong is off by much more
    for name, step in steps.items():
        other_loss, other = step()
        off = max(float((other_loss - loss).abs() / loss), float((other - gradient).norm() / gradient.norm()))
        if off > bound:
            raise SystemExit(f"loss: {name} is {off:.1e} off torchtitan's loss or gradient.")


def _products(hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    """The two products of all tokens alone, onto memory that is there: no loss over all tokens goes below."""
    logits, gradient = hidden @ weight.t(), torch.empty_like(hidden)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=gradient)

    return step
