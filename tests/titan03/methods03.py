"""What `[lora]` has beside plain adapters, on torchtitan 0.3: each row on ranks, against the same run of one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jobs03 import (
    BACKENDS,
    ROWS,
    build,
    config,
    feed_global_batches,
    fill_b_when_loaded,
    finish,
    losses_of,
    start_process_group,
    whole_adapter,
)
from launch import main
from parity03 import FSDP2, PP2, TP2, relative
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

DORA = {"use_dora": True}
PISSA = {"init": "pissa"}
OLORA = {"init": "olora", "alpha": 1.0}
IN_FULL = {"train_also": ["tok_embeddings", "output", "norm", "layers.*.*_norm"], "train_also_lr": 1e-3}
CHOSEN = {
    "use_rslora": True,
    "target_modules": ["all-linear", "output"],
    "exclude_modules": ["layers.1.attention.wk"],
    "rank_pattern": {"wq": 3, "layers.1.feed_forward.*": 6},
    "alpha_pattern": {"w2": 5.0},
}
DROPOUT = {"dropout": 0.2}
PACKED = {"base_format": "nf4"}
SETTINGS = {
    "packed": PACKED,
    "dora": DORA,
    "pissa": PISSA,
    "olora": OLORA,
    "in full": IN_FULL,
    "chosen": CHOSEN,
    "dropout": DROPOUT,
}
"""Runs of one rank; of `[lora]`, by name."""

STEPS = 3


@dataclass(frozen=True)
class Row:
    """A layout of one of `SETTINGS`."""

    settings: str
    layout: dict[str, Any] = field(default_factory=dict)
    checkpointing: Any = None
    microbatches: int = 1


LAYOUTS = {
    "DoRA, FSDP2": Row("dora", FSDP2),
    "DoRA, TP2": Row("dora", TP2),
    "DoRA, PP2": Row("dora", PP2),
    "PiSSA, FSDP2": Row("pissa", FSDP2),
    "PiSSA, TP2": Row("pissa", TP2),
    "PiSSA, PP2": Row("pissa", PP2),
    "OLoRA, TP2": Row("olora", TP2),
    "in full, FSDP2": Row("in full", FSDP2),
    "in full, TP2": Row("in full", TP2),
    "in full, PP2": Row("in full", PP2),
    "in full and accumulation, TP2": Row("in full", TP2, microbatches=2),
    "patterns and the head, TP2": Row("chosen", TP2),
    "patterns and the head, PP2": Row("chosen", PP2),
    "packed, FSDP2": Row("packed", FSDP2),
    "packed, PP2": Row("packed", PP2),
    "dropout, TP2": Row("dropout", TP2),
    "dropout and full AC, TP2": Row("dropout", TP2, FullAC.Config()),
    "dropout and selective AC, TP2": Row("dropout", TP2, SelectiveAC.Config()),
}
TABLE = {f"{name}, {backend}": (row, backend) for backend in BACKENDS for name, row in LAYOUTS.items()}

IN_CI = {
    "spmd_types": "DoRA, TP2; PiSSA, TP2; in full, TP2; in full, PP2; dropout and selective AC, TP2; packed, FSDP2",
    "partial_dtensor": "DoRA, FSDP2; PiSSA, PP2; in full and accumulation, TP2; patterns and the head, TP2",
}
"""The others run in `scripts/parity.sh` alone."""


def run_row(row: Row, folder: Path, bases: Path, backend: str, **more: Any) -> dict[str, Any]:
    """Losses, gradient norms, and what is trained before and after."""
    degree = row.layout.get("data_parallel_shard_degree", 1)
    options: dict[str, Any] = {
        **{f"parallelism__{name}": value for name, value in row.layout.items()},
        "parallelism__spmd_backend": backend,
        "training__local_batch_size": ROWS // degree // row.microbatches,
        "training__global_batch_size": ROWS,
        "training__steps": STEPS,
        "checkpoint__initial_load_path": str(bases / "dcp"),
        "activation_checkpoint": row.checkpointing,
        **more,
    }
    run = build(config(folder, SETTINGS[row.settings], **options))
    feed_global_batches(run)
    fill_b_when_loaded(run)
    finish(run)
    groups = [len(g["params"]) for o in run.trainer.optimizers.optimizers for g in o.param_groups]
    final = {"initial": run.initial, "final": whole_adapter(run)}
    return {"losses": losses_of(run), "grad_norms": run.grad_norms, "groups": groups, **final}


def one_rank(bases: Path) -> dict[str, Any]:
    """The runs that rows are compared with, of the backend that is the default."""
    losses: dict[str, Any] = {}
    for name in SETTINGS:
        result = run_row(Row(name), bases / "methods-one" / name, bases, BACKENDS[0])
        torch.save(result, bases / f"method-{name}.pt")
        losses[name] = result["losses"]
    return losses


def compare(name: str, folder: Path) -> dict[str, float]:
    """The largest relative differences of one row to one rank."""
    (row, backend), bases = TABLE[name], folder.parents[1]
    reference = torch.load(bases / f"method-{row.settings}.pt", weights_only=True)
    result = run_row(row, folder, bases, backend)
    assert result["final"].keys() == reference["final"].keys()
    assert result["initial"].keys() == reference["initial"].keys()
    apart = {
        kind: max(((result[kind][n] - v).norm() / v.norm().clamp(min=1e-3)).item() for n, v in reference[kind].items())
        for kind in ("initial", "final")
    }
    return {
        "loss": relative(result["losses"], reference["losses"]),
        "grad_norm": relative(result["grad_norms"], reference["grad_norms"]),
        **apart,
    }


if __name__ == "__main__":
    checks: dict[str, Any] = {n: (lambda folder, n=n: compare(n, folder)) for n in TABLE}
    main({**checks, "one rank": lambda folder: one_rank(folder.parents[1])}, start_process_group)
