"""The parts of bench.py that go through torchtitan's trainer: one rank, a Llama of 53M parameters, CPU or GPU.

python scripts/bench_trainer.py lora|full OPTIONS...    # trains three steps and prints the peak of memory
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_converter.titan import install

install()  # before torchtitan

import torch
import torch.distributed as dist
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, llama3_args
from torchtitan.train import Trainer

ROOT = Path(__file__).parents[1]
CONFIGS = {"lora": "debug_lora.toml", "full": "debug_base.toml"}

llama3_args["bench"] = TransformerModelArgs(dim=768, n_layers=8, n_heads=12, n_kv_heads=4, vocab_size=2048)

OPTIONS = (
    "--model.flavor=bench",
    "--checkpoint.no-enable",
    "--training.mixed_precision_param=bfloat16",
    "--training.steps=1000000",
    "--training.local_batch_size=2",
    "--training.seq_len=256",
    "--metrics.log_freq=1000000",
    "--debug.seed=0",
)


def make_trainer(kind: str, *options: str) -> Trainer:
    """That of a "lora" or "full" run, on a random base."""
    os.chdir(ROOT)
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    command = ["--job.config_file", f"configs/{CONFIGS[kind]}", *OPTIONS, *options]
    base = ["--checkpoint.initial_load_path="] if kind == "lora" else []
    return Trainer(ConfigManager().parse_args([*command, *base]))


def trainer_step(trainer: Trainer, data: Iterator[Any] | None = None) -> Callable[[], None]:
    """One training step: data (the trainer's own if none is given), forward, backward, clipping, AdamW."""
    data = data or trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(data)

    return step


def cut(flavor: str, layers: int) -> None:
    """Leaves the first `layers` layers of a flavor, in this process."""
    llama3_args[flavor] = dataclasses.replace(llama3_args[flavor], n_layers=layers)


def shape(flavor: str = "bench", layers: int | None = None) -> dict[str, int]:
    """What another library needs to know of a flavor, cut to `layers` where given, to build the same model."""
    args = llama3_args[flavor]
    args = dataclasses.replace(args, n_layers=layers or args.n_layers)
    with torch.device("meta"):
        model = Transformer(args)
    return {
        "width": args.dim,
        "hidden": model.layers["0"].feed_forward.w1.out_features,
        "layers": args.n_layers,
        "heads": args.n_heads,
        "kv_heads": args.n_kv_heads or args.n_heads,
        "vocabulary": args.vocab_size,
        "parameters": sum(param.numel() for param in model.parameters()),
    }


def parameters() -> int:
    return shape()["parameters"]


def peak_memory(kind: str, options: list[str]) -> int:
    """Bytes that a run of three steps takes at its peak above the imports, in a process of its own."""
    command = [sys.executable, __file__, kind, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    imports = 0 if torch.cuda.is_available() else _resident("VmRSS")
    run = trainer_step(make_trainer(*sys.argv[1:]))
    for _ in range(3):
        run()
    print((torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")) - imports)
