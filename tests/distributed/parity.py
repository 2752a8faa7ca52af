"""One training run under every layout: what each row of the parity table does, on one rank or many.

Ten steps of AdamW on one global batch per step, B away from zero so that every adapter has a gradient, clipping on.
The optimizer's eps is 1e-5: Adam's first steps are g / (|g| + eps), which turns the rounding of a gradient near zero,
here 1e-9 and less, into a step of full size unless eps stands well above it.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Run, adapter_state, build, finish
from launch import main
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.moe import MoEArgs

from lora_converter.apply import adapter_parameters
from lora_converter.linear import copy_full_, stable_hash

STEPS, ROWS, TOKENS = 10, 8, 64

TP2 = ["--parallelism.tensor_parallel_degree=2"]
PP2 = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=2"]
CP2 = ["--parallelism.context_parallel_degree=2"]
FSDP2 = ["--parallelism.data_parallel_shard_degree=2"]
EP2 = ["--parallelism.expert_parallel_degree=2"]
INTERLEAVED = ["--parallelism.pipeline_parallel_schedule=Interleaved1F1B"]
REPLICATE2 = ["--parallelism.data_parallel_replicate_degree=2"]
MOE = ["--model.name=deepseek_v3", "--model.flavor=tiny"]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "FSDP2": (2, FSDP2),
    "DDP2": (2, [*REPLICATE2, "--parallelism.data_parallel_shard_degree=1"]),
    "TP2": (2, TP2),
    "PP2 1F1B": (2, PP2),
    "PP2 interleaved": (2, [*PP2, *INTERLEAVED]),
    "CP2": (2, CP2),
    "HSDP 2x2": (4, [*REPLICATE2, *FSDP2]),
    "TP2 x FSDP2": (4, [*TP2, *FSDP2]),
    "CP2 x TP2": (4, [*CP2, *TP2]),
    "PP2 x TP2 x FSDP2": (8, [*PP2, *TP2, *FSDP2]),
    "PP2 x CP2 x FSDP2": (8, [*PP2, *CP2, *FSDP2]),
    "MoE, 1 rank": (1, MOE),
    "MoE, FSDP2": (2, [*MOE, *FSDP2]),
    "MoE, EP2": (2, [*MOE, *FSDP2, *EP2]),
    "MoE, EP2 x TP2": (4, [*MOE, *FSDP2, *TP2, *EP2, "--parallelism.expert_tensor_parallel_degree=2"]),
}

deepseekv3_args["tiny"] = DeepSeekV3ModelArgs(
    vocab_size=320,
    dim=64,
    inter_dim=160,
    moe_inter_dim=48,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, score_func="softmax", route_norm=True),
    q_lora_rank=24,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


def options_of(layout: str, bases: Path) -> list[str]:
    """The layout's arguments, the shared ones, and the base under `bases`."""
    _, options = LAYOUTS[layout]
    if layout.startswith("MoE"):
        base = [f"--checkpoint.initial_load_path={bases}/moe/checkpoint/step-0"]
    else:
        base = [f"--checkpoint.initial_load_path={bases}/llama", "--checkpoint.initial_load_in_hf"]
    return [
        *base,
        f"--training.steps={STEPS}",
        f"--training.global_batch_size={ROWS}",
        "--optimizer.eps=1e-5",
        "--training.max_norm=0.5",
        *options,
    ]


def feed_global_batches(run: Run) -> None:
    """Every layout reads the same rows at each step: data-parallel ranks take their part of one global batch."""
    mesh = run.trainer.parallel_dims.get_optional_mesh("batch")
    rank, degree = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    rows = ROWS // degree

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for step in itertools.count():
            generator = torch.Generator().manual_seed(step)
            # Short cycles, so that there is something to learn in ten steps.
            start = torch.randint(0, 64, (ROWS, 1), generator=generator)
            tokens = (start + 7 * torch.arange(TOKENS + 1)) % 64
            part = tokens[rank * rows : (rank + 1) * rows]
            yield {"input": part[:, :-1]}, part[:, 1:]

    generate = run.trainer.batch_generator
    run.trainer.batch_generator = lambda _: generate(batches())


def build_row(layout: str, folder: Path, bases: Path, *more: str) -> Run:
    """A trainer of this layout, fed with the global batches. B is random once the base is loaded."""
    options = options_of(layout, bases)
    degree = 1
    for option in options:
        name, _, value = option.partition("=")
        if name in ("--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"):
            degree *= int(value)
    run = build(folder, *options, f"--training.local_batch_size={ROWS // degree}", *more)
    feed_global_batches(run)
    load = run.trainer.checkpointer.load

    def load_and_fill(step: int = -1) -> bool:
        loaded = load(step)
        if run.trainer.step == 0:
            fill_b(run)
        return loaded

    run.trainer.checkpointer.load = load_and_fill
    return run


def fill_b(run: Run) -> None:
    for part in run.trainer.model_parts:
        for name, param in adapter_parameters(part).items():
            if name.endswith("lora_b.weight"):
                generator = torch.Generator().manual_seed(stable_hash(name))
                copy_full_(param, torch.empty(param.shape).normal_(std=0.05, generator=generator))


def whole_adapter(run: Run) -> dict[str, torch.Tensor]:
    """The adapters of all pipeline stages, as full tensors, on every rank."""
    gathered: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, adapter_state(run))
    return {name: value for part in gathered for name, value in part.items()}


def losses_of(run: Run) -> list[float]:
    """Under PP the last stage alone knows the loss; the others log -1."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)
    return losses.tolist()


def train_row(layout: str, folder: Path, bases: Path) -> dict[str, Any]:
    """Ten steps. Returns losses, gradient norms, and the adapters before and after."""
    run = build_row(layout, folder, bases)
    initial = whole_adapter(run)
    finish(run)
    return {
        "losses": losses_of(run),
        "grad_norms": run.grad_norms,
        "initial": initial,
        "final": whole_adapter(run),
    }


def compare_row(layout: str, folder: Path) -> dict[str, float]:
    """The figures of one row of the table: largest relative differences to one rank."""
    bases = folder.parent.parent
    reference = torch.load(bases / ("moe.pt" if layout.startswith("MoE") else "llama.pt"), weights_only=True)
    row = train_row(layout, folder, bases)
    assert row["initial"].keys() == reference["initial"].keys()
    unequal = [name for name in row["initial"] if not torch.equal(row["initial"][name], reference["initial"][name])]
    assert not unequal, f"initial adapters differ: {unequal}"
    return {
        "loss": relative(row["losses"], reference["losses"]),
        "grad_norm": relative(row["grad_norms"], reference["grad_norms"]),
        "adapter": max(
            ((row["final"][name] - value).norm() / value.norm()).item() for name, value in reference["final"].items()
        ),
    }


def relative(values: list[float], expected: list[float]) -> float:
    assert len(values) == len(expected) == STEPS
    return max(abs(value - reference) / abs(reference) for value, reference in zip(values, expected, strict=True))


CHECKS = {
    layout: (lambda folder, layout=layout: compare_row(layout, folder))
    for layout, (ranks, _) in LAYOUTS.items()
    if ranks > 1
}

if __name__ == "__main__":
    main(CHECKS)
    sys.exit()
