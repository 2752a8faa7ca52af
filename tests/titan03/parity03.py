"""One run on torchtitan 0.3 under every layout and backend: what each row does, on one rank or many.

As `parity.py` of 0.2.2: ten steps of AdamW on one global batch per step, B away from zero, clipping on, and an eps well
above the rounding of gradients near zero.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import ROWS
from jobs03 import (
    BACKENDS,
    STEPS,
    build,
    config,
    feed_global_batches,
    fill_b_when_loaded,
    finish,
    losses_of,
    start_process_group,
    trained_tensors,
    whole_adapter,
)
from launch import main

from lora_converter.titan03 import trainer

TP2 = dict(tensor_parallel_degree=2)
PP2 = dict(pipeline_parallel_degree=2)
CP2 = dict(context_parallel_degree=2)
FSDP2 = dict(data_parallel_shard_degree=2)
HSDP = dict(data_parallel_replicate_degree=2, data_parallel_shard_degree=2)


@dataclass(frozen=True)
class Row:
    """A layout, compared with one rank that runs the same job."""

    ranks: int
    layout: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `[lora]`; one rank has them too."""

    microbatches: int = 1
    """Gradient accumulation; one rank takes the whole batch at once."""

    in_hf: bool = False
    """The base is read from the Hugging Face folder, not from the DCP one."""

    @property
    def degree(self) -> int:
        """Of data parallelism."""
        shards, replicas = (self.layout.get(f"data_parallel_{k}_degree", 1) for k in ("shard", "replicate"))
        return shards * replicas


LAST_LAYER = {"target_modules": ["layers.3.*"]}
ROWS_OF_ONE_BACKEND = {
    "FSDP2": Row(2, FSDP2),
    "TP2": Row(2, TP2),
    "PP2": Row(2, PP2),
    "CP2": Row(2, CP2),
    "HSDP 2x2": Row(4, HSDP),
    "TP2 x FSDP2": Row(4, TP2 | FSDP2),
    "PP2 x TP2 x FSDP2": Row(8, PP2 | TP2 | FSDP2),
    "accumulation, TP2": Row(2, TP2, microbatches=2),
    "accumulation, FSDP2": Row(2, FSDP2, microbatches=2),
    "adapters in the last layer alone, PP2": Row(2, PP2, LAST_LAYER),
    "a base in Hugging Face's format, FSDP2": Row(2, FSDP2, in_hf=True),
    "a base in Hugging Face's format, TP2": Row(2, TP2, in_hf=True),
}
BY_HAND = ("HSDP 2x2", "TP2 x FSDP2")
"""In `scripts/parity.sh` alone; CI has a mix of eight ranks."""

TABLE = {f"{name}, {backend}": (row, backend) for backend in BACKENDS for name, row in ROWS_OF_ONE_BACKEND.items()}


def options(row: Row, bases: Path, backend: str) -> dict[str, Any]:
    """Of the trainer's config."""
    return {
        **{f"parallelism__{name}": degree for name, degree in row.layout.items()},
        "parallelism__spmd_backend": backend,
        "training__local_batch_size": ROWS // row.degree // row.microbatches,
        "training__global_batch_size": ROWS,
        "checkpoint__initial_load_path": str(bases / ("hf" if row.in_hf else "dcp")),
        "checkpoint__initial_load_in_hf": row.in_hf,
    }


def train_row(row: Row, folder: Path, bases: Path, backend: str) -> dict[str, Any]:
    """Ten steps. Returns losses, gradient norms, the adapters before and after, and counts."""
    sums: list[int] = []
    complete = trainer.sum_partial_gradients
    run = build(config(folder, row.settings, **options(row, bases, backend)))
    feed_global_batches(run)
    fill_b_when_loaded(run)
    trainer.sum_partial_gradients = lambda params: sums.append(complete(params))
    try:
        finish(run)
    finally:
        trainer.sum_partial_gradients = complete
    return {
        "losses": losses_of(run),
        "grad_norms": run.grad_norms,
        "initial": run.initial,
        "final": whole_adapter(run),
        "sums": sums,
        "trained": trained_tensors(run),
    }


def one_rank(bases: Path, backend: str) -> None:
    """The runs that rows are compared with."""
    for name, settings in {"": {}, "last": LAST_LAYER}.items():
        result = train_row(Row(1, settings=settings), bases / f"{backend}{name}", bases, backend)
        torch.save(result, bases / f"{backend}{name}.pt")


def compare_row(name: str, folder: Path) -> dict[str, float]:
    """The figures of one row: largest relative differences to one rank."""
    (row, backend), bases = TABLE[name], folder.parent.parent
    reference = torch.load(bases / f"{backend}{'last' * bool(row.settings)}.pt", weights_only=True)
    result = train_row(row, folder, bases, backend)
    assert result["initial"].keys() == reference["initial"].keys()
    unequal = [n for n in result["initial"] if not torch.equal(result["initial"][n], reference["initial"][n])]
    assert not unequal, f"initial adapters differ: {unequal}"
    stages = torch.tensor(result["trained"])
    dist.all_reduce(stages)
    copies = row.ranks // row.layout.get("pipeline_parallel_degree", 1)
    assert stages == copies * len(reference["final"]) == copies * reference["trained"], "not the adapters alone train"
    # One all-reduce per step completes the gradients under TP, however many micro-batches, stages and shards there are.
    assert result["sums"] == [int("TP2" in name)] * STEPS, result["sums"]
    changed = {n: (result["final"][n] - value).norm() / value.norm() for n, value in reference["final"].items()}
    return {
        "loss": relative(result["losses"], reference["losses"]),
        "grad_norm": relative(result["grad_norms"], reference["grad_norms"]),
        "adapter": max(value.item() for value in changed.values()),
    }


def relative(values: list[float], expected: list[float]) -> float:
    assert len(values) == len(expected)
    return max(abs(value - reference) / abs(reference) for value, reference in zip(values, expected, strict=True))


if __name__ == "__main__":
    checks: dict[str, Any] = {n: (lambda folder, n=n: compare_row(n, folder)) for n in TABLE}
    checks |= {b: (lambda folder, b=b: one_rank(folder.parent.parent, b)) for b in BACKENDS}
    main(checks, start_process_group)
