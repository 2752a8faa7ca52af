"""Conversations on torchtitan 0.3's layouts: losses, norms, rows and validation losses are those of one rank."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs03
import torch
import torch.distributed as dist
from chat_job import chat_options
from hf_tiny import tiny_llama
from jobs03 import Run, fill_b_when_loaded, start_process_group
from launch import main

from lora_converter.titan03 import chat

STEPS, ROWS = 4, 8
"""Of a run, and rows of its global batch."""

LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "FSDP2": ({}, 2),
    "PP2": ({"parallelism__pipeline_parallel_degree": 2}, 1),
    "TP2": ({"parallelism__tensor_parallel_degree": 2}, 1),
    "CP2": ({"parallelism__context_parallel_degree": 2}, 1),
}
"""Options, and how many ranks see different rows. All of two ranks."""


def make_files(folder: Path) -> None:
    """A base and conversations."""
    tiny_llama().save_pretrained(folder / "base")
    chat_options(folder / "chat")


def chat_config(folder: Path, files: Path, *, degree: int = 1, **options: Any) -> Any:
    """The config of the job.

    Args:
        degree: How many ranks see different rows.
        options: `chat__option` or as those of `jobs03.host_config`.
    """
    own = {name[len("chat__") :]: options.pop(name) for name in list(options) if name.startswith("chat__")}
    sizes = dict(training__local_batch_size=ROWS // degree, training__global_batch_size=ROWS, training__steps=STEPS)
    base = dict(checkpoint__initial_load_path=str(files / "base"), checkpoint__initial_load_in_hf=True)
    options = {"hf_assets_path": str(files / "chat" / "tokenizer"), **sizes, **base, **options}
    return chat(
        jobs03.config(folder, **options),
        str(files / "chat" / "train.jsonl"),
        **{"cache_path": str(files / "chat" / "cache"), "validation_split": 0.1, **own},
    )


def record(config: Any) -> dict[str, Any]:
    """Trains and returns what was logged and read; rows are those of all data ranks, in their global order."""
    run = jobs03.build(config)
    fill_b_when_loaded(run)
    batches, validated = watch(run)
    jobs03.finish(run)
    return {
        "losses": jobs03.losses_of(run),
        "norms": run.grad_norms,
        "validated": of_last_rank(validated),
        "rows": rows_of(run, batches),
    }


def watch(run: Run) -> tuple[list[Any], list[float]]:
    """Lists that fill with the batches that this rank reads, and with its validation losses."""
    trainer, batches, validated = run.trainer, [], []
    generate, log = trainer.batch_generator, trainer.metrics_processor.log_validation

    def noting(data: Any) -> Iterator[Any]:
        for inputs, labels in generate(data):
            batches.append(torch.stack([inputs["input"], inputs["positions"], labels], 1))
            yield inputs, labels

    def log_validation(loss: float, step: int, **more: Any) -> None:
        validated.append(float(loss))
        log(loss=loss, step=step, **more)

    trainer.batch_generator, trainer.metrics_processor.log_validation = noting, log_validation
    return batches, validated


def of_last_rank(values: list[float]) -> list[float]:
    """Which is on the last pipeline stage."""
    gathered: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return gathered[-1]


def rows_of(run: Run, batches: list[torch.Tensor]) -> torch.Tensor:
    """(steps, rows, 3, seq_len): inputs, positions and labels of each step's global batch."""
    mesh = run.trainer.parallel_dims.get_optional_mesh("batch")
    local = torch.stack(batches)
    local = local.reshape(len(run.losses), -1, *local.shape[1:])  # (steps, micro-batches, rows, 3, seq_len)
    if mesh is None or mesh.size() == 1:
        return local.flatten(1, 2)
    parts = [torch.empty_like(local) for _ in range(mesh.size())]
    dist.all_gather(parts, local.contiguous(), group=mesh.get_group())
    return torch.stack(parts, 2).flatten(1, 3)  # rank after micro-batch: the global order


VALIDATION = dict(validator__enable=True, validator__freq=2)


def reference(files: Path, **options: Any) -> dict[str, Any]:
    """The run of one rank, made by the first that asks, in the process that launches the others."""
    path = files / f"one{''.join(f'-{name}-{value}' for name, value in options.items())}.pt"
    if not path.exists():
        torch.save(record(chat_config(path.with_suffix(""), files, **VALIDATION, **options)), path)
    return torch.load(path, weights_only=True)


def on_layout(name: str, backend: str, **options: Any) -> Callable[[Path], dict[str, float]]:
    layout, degree = LAYOUTS[name]

    def check(folder: Path) -> dict[str, float]:
        files = folder.parent.parent
        torch._dynamo.reset()  # another job's shapes count against one function's
        own = dict(layout, parallelism__spmd_backend=backend, degree=degree)
        found = record(chat_config(folder, files, **VALIDATION, **own, **options))
        expected = reference(files, **{n: v for n, v in options.items() if n.startswith("chat__")})
        assert torch.equal(found["rows"], expected["rows"])
        worst = {}
        for figure in ("losses", "norms", "validated"):
            assert len(found[figure]) == len(expected[figure]) > 0, (figure, found[figure], expected[figure])
            pairs = zip(found[figure], expected[figure], strict=True)
            worst[figure] = max(abs(a - b) / abs(b) for a, b in pairs)
        # fp32; sums in other orders. The clipped norm of a first step is the sum of many small squares.
        assert worst["losses"] < 1e-6 and worst["validated"] < 1e-6 and worst["norms"] < 1e-5, worst
        return worst

    return check


def moves(folder: Path) -> None:
    """A step under FSDP2, TP2, PP2 and CP2, with the backends in turn: each goes on at the right row."""
    files, losses = folder.parent.parent, []
    expected = reference(files)
    more = dict(checkpoint__interval=1, lr_scheduler__total_steps=STEPS)
    for step, (layout, degree) in enumerate(LAYOUTS.values(), 1):
        torch._dynamo.reset()
        backend = jobs03.BACKENDS[step % 2]
        own = dict(layout, parallelism__spmd_backend=backend, training__steps=step, degree=degree)
        run = jobs03.build(chat_config(folder, files, **more, **own))
        fill_b_when_loaded(run)
        jobs03.finish(run)
        losses += jobs03.losses_of(run)
        assert run.trainer.dataloader.order.consumed == step * ROWS
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(losses, expected["losses"], strict=True)), losses


ONE_PER_ROW = dict(chat__packing="none")
CHECKS: dict[str, Callable[[Path], Any]] = {
    **{f"{name}, {backend}": on_layout(name, backend) for name in LAYOUTS for backend in jobs03.BACKENDS},
    "accumulation, FSDP2": on_layout("FSDP2", "spmd_types", training__local_batch_size=2),
    "accumulation, PP2": on_layout("PP2", "spmd_types", training__local_batch_size=4),
    "one conversation per row, PP2": on_layout("PP2", "spmd_types", **ONE_PER_ROW),
    "from layout to layout": moves,
}

if __name__ == "__main__":
    main(CHECKS, start_process_group)
