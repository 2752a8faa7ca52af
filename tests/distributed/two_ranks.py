"""Two gloo ranks: every parallelism that two ranks allow trains from one base."""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from harness import train
from hf_models import save_tiny_llama
from launch import main

LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree=2"],
    "ddp2": ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
    "tp2": ["--parallelism.tensor_parallel_degree=2"],
    "pp2": ["--parallelism.pipeline_parallel_degree=2"],
    "cp2": ["--parallelism.context_parallel_degree=2"],
}


def _trains(folder: Path, layout: str) -> None:
    base = folder / "base"
    if dist.get_rank() == 0:
        save_tiny_llama(base)
    dist.barrier()
    source = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]
    run = train(folder, *source, *LAYOUTS[layout])
    losses = torch.tensor(run.losses)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)  # under PP the last stage alone knows the loss
    assert len(losses) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses.tolist()), losses
    print(layout, losses.tolist(), run.grad_norms)


def check_fsdp2_trains(folder: Path) -> None:
    _trains(folder, "fsdp2")


def check_ddp2_trains(folder: Path) -> None:
    _trains(folder, "ddp2")


def check_tp2_trains(folder: Path) -> None:
    _trains(folder, "tp2")


def check_pp2_trains(folder: Path) -> None:
    _trains(folder, "pp2")


def check_cp2_trains(folder: Path) -> None:
    _trains(folder, "cp2")


if __name__ == "__main__":
    main(globals())
