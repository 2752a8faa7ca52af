"""Conversations on layouts: batches, losses and validation losses are those of one rank, also after a change."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from chat_job import chat_options
from harness import Run, build, finish
from launch import main
from parity import (
    CP2,
    DDP2,
    FSDP2,
    FULL_AC,
    INTERLEAVED,
    OVER_LOGITS,
    PP2,
    REPLICATE2,
    TP2,
    losses_of,
)
from tiny_models import base_options

from lora_converter.chat.rows import IGNORED

STEPS, ROWS = 4, 8
"""Of a run, and rows of its global batch."""

VALIDATION = (
    *("--validation.enable", "--validation.dataset=chat", "--chat.validation_split=0.1", "--validation.freq=2"),
)
LAYOUTS: dict[str, tuple[int, list[str], int]] = {
    "FSDP2": (2, FSDP2, 2),
    "DDP2": (2, DDP2, 2),
    "TP2": (2, TP2, 1),
    "PP2": (2, PP2, 1),
    "PP2 interleaved": (2, [*PP2, *INTERLEAVED], 1),
    "CP2": (2, CP2, 1),
    "full AC, TP2": (2, [*TP2, *FULL_AC], 1),
    "HSDP 2x2": (4, [*REPLICATE2, *FSDP2], 4),
    "PP2 x TP2 x FSDP2": (8, [*PP2, *TP2, *FSDP2], 2),
    "PP2 x CP2 x FSDP2": (8, [*PP2, *CP2, *FSDP2], 2),
}
"""Ranks, options, and how many ranks see different rows."""


def chat_run(
    folder: Path, bases: Path, layout: list[str], degree: int, *options: str, model: str = "llama3", batches: int = 1
) -> Run:
    """A trainer of the job; `batches` micro-batches of each data rank make a step."""
    local = ROWS // degree // batches
    sizes = [f"--training.local_batch_size={local}", f"--training.global_batch_size={ROWS}"]
    sizes += [f"--validation.local_batch_size={ROWS // degree}", f"--training.steps={STEPS}"]
    # Adam's default eps divides differences of 1e-9 in gradients that are zero but for rounding.
    tolerant = ["--optimizer.eps=1e-5", "--debug.seed=11", "--checkpoint.no-last_save_model_only"]
    sizes += ["--lora.loss_chunk_tokens=24"]
    base = base_options(model, bases)
    return build(folder, *base, *chat_options(bases / "chat"), *layout, *sizes, *tolerant, *options)


def record(run: Run) -> dict[str, Any]:
    """Trains and returns what was logged and read; rows are those of all data ranks, in their global order."""
    validated: list[float] = []
    log = run.trainer.metrics_processor.log_validation

    def log_validation(loss: float, step: int) -> None:
        validated.append(float(loss))
        log(loss=loss, step=step)

    run.trainer.metrics_processor.log_validation = log_validation
    finish(run)
    assert all(map(math.isfinite, run.max_losses)) and len(run.max_losses) == STEPS
    return {"losses": losses_of(run), "norms": run.grad_norms, "validated": last(validated), "rows": rows_of(run)}


def last(values: list[float]) -> list[float]:
    """Those of the last rank, which is on the last pipeline stage."""
    gathered: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return gathered[-1]


def rows_of(run: Run) -> torch.Tensor:
    """(steps, rows, 2, seq_len): inputs and labels of each step's global batch."""
    dims = run.trainer.parallel_dims
    mesh = dims.get_optional_mesh("batch")
    local = torch.stack([torch.stack([inputs, labels], 1) for inputs, labels in run.batches])
    steps = len(run.losses) or STEPS
    local = local.reshape(steps, -1, *local.shape[1:])  # (steps, micro-batches, rows, 2, seq_len)
    if mesh is None or mesh.size() == 1:
        return local.flatten(1, 2)
    parts = [torch.empty_like(local) for _ in range(mesh.size())]
    dist.all_gather(parts, local.contiguous(), group=mesh.get_group())
    return torch.stack(parts, 2).flatten(1, 3)  # rank after micro-batch: the global order


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    assert torch.equal(found["rows"], expected["rows"])
    worst = {}
    for name in ("losses", "norms", "validated"):
        assert len(found[name]) == len(expected[name]) > 0, (name, found[name], expected[name])
        pairs = zip(found[name], expected[name], strict=True)
        worst[name] = max(abs(a - b) / abs(b) for a, b in pairs)
    # fp32; sums in other orders. The clipped norm of a first step is the sum of many small squares.
    assert worst["losses"] < 1e-6 and worst["validated"] < 1e-6 and worst["norms"] < 1e-5, worst
    return worst


def reference(bases: Path, model: str = "llama3", *options: str) -> dict[str, Any]:
    """The run of one rank, over all logits, made by the first that asks, in the process that launches the others."""
    path = bases / f"chat-{model}{''.join(options)}.pt".replace("--", "-")
    if not path.exists():
        folder = bases / f"chat-one-{model}{len(options)}"
        torch.save(record(chat_run(folder, bases, [], 1, *VALIDATION, *options, *OVER_LOGITS, model=model)), path)
    return torch.load(path, weights_only=True)


def on_layout(name: str, *options: str, model: str = "llama3", batches: int = 1) -> Callable[[Path], dict[str, float]]:
    _, layout, degree = LAYOUTS[name]

    def check(folder: Path) -> dict[str, float]:
        bases = folder.parent.parent
        torch._dynamo.reset()  # another job's shapes count against one function's
        run = chat_run(folder, bases, layout, degree, *VALIDATION, *options, model=model, batches=batches)
        return compare(record(run), reference(bases, model, *options))

    return check


def without_labels(folder: Path) -> dict[str, float]:
    """Short conversations in long rows: one of two context-parallel ranks has not one trained token."""
    bases, options = folder.parent.parent, (ONE_PER_ROW, LONG)
    torch._dynamo.reset()
    run, counts = chat_run(folder, bases, CP2, 1, *VALIDATION, *options), []
    loss_fn = run.trainer.loss_fn

    def counting(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        counts.append(int((labels != IGNORED).sum()))
        return loss_fn(predicted, labels)

    run.trainer.loss_fn = counting
    figures = compare(record(run), reference(bases, "llama3", *options))
    gathered: list[list[int]] = [[]] * 2
    dist.all_gather_object(gathered, counts)
    assert min(gathered[0]) > 0 == max(gathered[1]) and len(gathered[1]) == STEPS, gathered
    return figures


def moves(folder: Path) -> None:
    """One step under FSDP2, one under TP2, one under PP2, one under DDP2: each goes on at the right row."""
    bases = folder.parent.parent
    expected = reference(bases)
    losses: list[float] = []
    more = ["--checkpoint.interval=1", "--chat.validation_split=0.1", f"--lr_scheduler.total_steps={STEPS}"]
    torch._dynamo.reset()
    for step, name in enumerate(("FSDP2", "TP2", "PP2", "DDP2"), 1):
        _, layout, degree = LAYOUTS[name]
        run = chat_run(folder, bases, layout, degree, *more, f"--training.steps={step}")
        finish(run)
        losses += losses_of(run)
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(losses, expected["losses"], strict=True)), losses


ONE_PER_ROW, LONG = "--chat.packing=none", "--training.seq_len=1024"
CASES: dict[str, tuple[int, Callable[[Path], Any]]] = {
    **{name: (ranks, on_layout(name)) for name, (ranks, *_) in LAYOUTS.items()},
    "accumulation, FSDP2": (2, on_layout("FSDP2", batches=2)),
    "accumulation, TP2": (2, on_layout("TP2", batches=2)),
    "one conversation per row, CP2": (2, on_layout("CP2", ONE_PER_ROW)),
    "one conversation per row, PP2": (2, on_layout("PP2", ONE_PER_ROW)),
    "a rank without trained tokens, CP2": (2, without_labels),
    "qwen3, TP2": (2, on_layout("TP2", model="qwen3")),
    "qwen3, one conversation per row, CP2": (2, on_layout("CP2", ONE_PER_ROW, model="qwen3")),
    "from layout to layout": (2, moves),
}
CHECKS = {name: check for name, (_, check) in CASES.items()}
NEEDS = {(model, options) for model in ("llama3", "qwen3") for options in ((), (ONE_PER_ROW,))}
NEEDS.add(("llama3", (ONE_PER_ROW, LONG)))
"""References."""

if __name__ == "__main__":
    main(CHECKS)
