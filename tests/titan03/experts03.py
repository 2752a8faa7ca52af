"""Mixtures of experts on several ranks of torchtitan 0.3: the same run, and the same PEFT directory, as on one.

torchtitan's grouped products are in bf16. There a change of 1e-7 in the base is one of 2e-5 in gradient norms, and at
larger rates sends rows to other experts; of products in fp32 it stays 1e-7. So layouts are compared in fp32, with the
bounds of a dense model, and once more as torchtitan computes.
"""

import filecmp
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from jobs03 import (
    BACKENDS,
    Run,
    build,
    config,
    feed_global_batches,
    fill_b_when_loaded,
    finish,
    host_config,
    losses_of,
    start_process_group,
)
from launch import main

MIXTURES = ("qwen3_moe", "deepseek_v3")
SMALL = {"alpha": 8.0}
JOBS: dict[str, dict[str, Any]] = {
    "linears": SMALL | {"target_modules": ["all-linear"]},
    "experts": SMALL | {"target_modules": ["all-linear", "experts"], "expert_rank": 3},
}
FSDP = {"parallelism__data_parallel_shard_degree": -1}
WHOLE = {"parallelism__data_parallel_shard_degree": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP2": FSDP,
    "TP2": WHOLE | {"parallelism__tensor_parallel_degree": 2},
    "PP2": WHOLE | {"parallelism__pipeline_parallel_degree": 2},
    "EP2": FSDP | {"parallelism__expert_parallel_degree": 2},
    "TP2 EP2": WHOLE | {"parallelism__tensor_parallel_degree": 2, "parallelism__expert_parallel_degree": 2},
}
BOUNDS = {"fp32": {"losses": 1e-6, "norms": 1e-5}, "bf16": {"losses": 1e-5, "norms": 1e-3}}
"""Of relative differences. bf16's are those of 0.2.2: a hundred times what fp32 has of a norm, ten times of a loss."""


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """`torch._grouped_mm` in fp32, and what torchtitan and we cast to bf16 for it left as it is."""
    if dtype == "bf16":
        yield
        return
    with mock.patch("torch._grouped_mm", _one_by_one), mock.patch.object(torch.Tensor, "bfloat16", lambda x: x):
        yield


def _one_by_one(x: torch.Tensor, y: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if y.ndim == 3:  # rows by experts' matrices, (rows, in) (experts, in, out)
        return torch.cat([x[part] @ y[e] for e, part in enumerate(parts)])
    return torch.stack([x[:, part] @ y[part] for part in parts])  # (in, rows) (rows, out)


def save_base(model: str, folder: Path) -> Path:
    """A base of random weights as torchtitan stores it; on one rank, since they depend on the layout."""
    run = build(host_config(folder, model=model, training__steps=1, checkpoint__last_save_model_only=True))
    run.trainer.checkpointer.save(1, last_step=True)
    run.trainer.close()
    return folder / "checkpoint" / "step-1"


def figures(folder: Path, base: Path, model: str, job: str, dtype: str, **options: Any) -> dict[str, Any]:
    """What a run shows: losses, gradient norms and the adapters' initial values."""
    made = config(folder, JOBS[job], model=model, checkpoint__initial_load_path=str(base), **options)
    made.optimizer.param_groups[0].optimizer_kwargs["lr"] = 3e-4
    run = build(made)
    feed_global_batches(run)
    fill_b_when_loaded(run)
    with products(dtype):
        finish(run)
    return {"losses": losses_of(run), "norms": run.grad_norms, "initial": run.initial}


def same_as_one_rank(folder: Path, model: str, job: str, dtype: str, layout: str, backend: str) -> dict[str, float]:
    bases = folder.parent.parent
    reference = torch.load(bases / f"{model} {job} {dtype}.pt")
    options = LAYOUTS[layout] | {"parallelism__spmd_backend": backend}
    found = figures(folder, bases / model / "checkpoint" / "step-1", model, job, dtype, **options)
    assert found["initial"].keys() == reference["initial"].keys()
    assert all(torch.equal(value, found["initial"][name]) for name, value in reference["initial"].items())
    differences = {name: far(found[name], reference[name]) for name in BOUNDS[dtype]}
    assert all(value <= BOUNDS[dtype][name] for name, value in differences.items()), differences
    return differences


def far(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def filled(folder: Path, model: str, base: Path, **options: Any) -> Run:
    """A run on a Hugging Face base whose adapters are away from zero."""
    in_hf = {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": str(base)}
    run = build(config(folder, JOBS["experts"], model=model, **in_hf, **options))
    fill_b_when_loaded(run)
    run.trainer.checkpointer.load()
    return run


def same_directory(folder: Path, model: str, layout: str, backend: str) -> None:
    bases = folder.parent.parent
    options = LAYOUTS[layout] | {"parallelism__spmd_backend": backend}
    run = filled(folder, model, bases / f"{model} in HF", **options)
    run.trainer.checkpointer.run.write_peft(str(folder / "peft"))
    run.trainer.close()
    dist.barrier()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(folder / "peft" / file, bases / f"{model} in PEFT" / file, shallow=False), file


ROWS = [
    *(("deepseek_v3", "experts", "fp32", layout, backend) for layout in LAYOUTS for backend in BACKENDS),
    *(("qwen3_moe", "experts", "fp32", layout, "spmd_types") for layout in LAYOUTS),
    *((model, "linears", "fp32", layout, "spmd_types") for model in MIXTURES for layout in ("TP2", "EP2")),
    *((model, "experts", "bf16", "EP2", "spmd_types") for model in MIXTURES),
]
CHECKS = {" ".join(row): lambda folder, row=row: same_as_one_rank(folder, *row) for row in ROWS} | {
    f"{model} in PEFT {layout} {backend}": lambda folder, row=(model, layout, backend): same_directory(folder, *row)
    for model, backend in zip(MIXTURES, BACKENDS, strict=True)
    for layout in ("EP2", "TP2")
}

if __name__ == "__main__":
    main(CHECKS, start_process_group)
