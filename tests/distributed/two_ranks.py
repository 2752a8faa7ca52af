"""Two gloo ranks: every parallelism that two ranks allow trains from one base."""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from harness import adapter_state, build, finish
from hf_models import save_tiny_llama
from launch import main
from torchtitan.models.llama3 import Transformer, llama3_args

from lora_converter import LoRAConfig, adapter_parameters, apply_lora

LAYOUTS = {
    "fsdp2": ["--parallelism.data_parallel_shard_degree=2"],
    "ddp2": ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
    "tp2": ["--parallelism.tensor_parallel_degree=2"],
    "pp2": ["--parallelism.pipeline_parallel_degree=2"],
    "cp2": ["--parallelism.context_parallel_degree=2"],
}


def _trains(folder: Path, *layout: str) -> None:
    """Three steps from one base: the adapters start as on one device, the loss is finite and falls."""
    base = folder / "base"
    if dist.get_rank() == 0:
        save_tiny_llama(base)
    dist.barrier()
    source = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]
    run = build(folder, *source, *layout)
    for name, value in adapter_state(run).items():
        assert torch.equal(value, one_device_adapters()[name]), name
    parts = run.trainer.model_parts
    trained = {p for part in parts for p in adapter_parameters(part).values()}
    assert {p for part in parts for p in part.parameters() if p.requires_grad} == trained
    finish(run)
    losses = torch.tensor(run.losses)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)  # under PP the last stage alone knows the loss
    assert len(losses) == 3 and losses.isfinite().all() and 0 < losses[2] < losses[0], losses


@functools.cache
def one_device_adapters() -> dict[str, torch.Tensor]:
    """The adapters of the debug job on the tiny model, unsharded, by the core alone."""
    model = Transformer(llama3_args["tiny"])
    apply_lora(model, LoRAConfig(rank=4), seed=11)
    return {name: value.detach() for name, value in adapter_parameters(model).items()}


def check_fsdp2_trains(folder: Path) -> None:
    _trains(folder, *LAYOUTS["fsdp2"])


def check_ddp2_trains(folder: Path) -> None:
    _trains(folder, *LAYOUTS["ddp2"])


def check_tp2_trains(folder: Path) -> None:
    _trains(folder, *LAYOUTS["tp2"])


def check_pp2_trains(folder: Path) -> None:
    _trains(folder, *LAYOUTS["pp2"])


def check_cp2_trains(folder: Path) -> None:
    _trains(folder, *LAYOUTS["cp2"])


if __name__ == "__main__":
    main(globals())
