"""Runs torchtitan's own trainer in this process, many times over one process group, and records what it does."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lora_converter.titan import install

install()  # before torchtitan

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._attention import _disable_context_parallel_dispatcher
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.train import Trainer

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "debug_lora.toml"
BASE_CONFIG = ROOT / "configs" / "debug_base.toml"

# Unequal everywhere: kv heads != heads, hidden != 4 dim, vocab != dim, so that no transpose goes unseen.
TINY = dict(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=96, rope_theta=500000)
llama3_args["tiny"] = TransformerModelArgs(**TINY)

TINY_ARGS = (
    "--model.flavor=tiny",
    f"--model.hf_assets_path={ROOT}/tests/assets/tokenizer",
    f"--training.dataset_path={ROOT}/tests/assets/c4_test",
    "--training.local_batch_size=4",
    "--training.seq_len=64",
    "--training.steps=3",
    "--debug.seed=11",
)


@dataclass
class Run:
    """One training run: what was logged at each step, what was read, and the trainer as it ended."""

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    max_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    batches: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    begun: dict[str, torch.Tensor] = field(default_factory=dict)


def parse(folder: Path | str, *args: str, config: Path = CONFIG) -> Any:
    """The debug job on the tiny model, dumped under `folder`; later arguments win."""
    rank = ["--lora.rank=4"] if config == CONFIG else []
    command = ["--job.config_file", str(config), *TINY_ARGS, *rank, f"--job.dump_folder={folder}", *args]
    return ConfigManager().parse_args(command)


def start_process_group() -> None:
    """A gloo group from torchrun's environment, or of this process alone."""
    if not dist.is_initialized():
        for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1").items():
            os.environ.setdefault(name, value)
        alone = os.environ["WORLD_SIZE"] == "1"
        store = dist.HashStore() if alone else None
        dist.init_process_group("gloo", store=store, rank=0 if alone else -1, world_size=1 if alone else -1)


def build(folder: Path | str, *args: str, config: Path = CONFIG) -> Run:
    """A trainer that records; `train()` it, or look at it as it is before the first step."""
    start_process_group()
    # torchtitan switches attention to its context-parallel form for good; the next run here may have another layout.
    _disable_context_parallel_dispatcher()
    run = Run(Trainer(parse(folder, *args, config=config)))
    log = run.trainer.metrics_processor.log
    generate = run.trainer.batch_generator

    def record_log(step: int, loss: float, max_loss: float, grad_norm: float, extra_metrics: dict) -> None:
        run.losses.append(float(loss))
        run.max_losses.append(float(max_loss))
        run.grad_norms.append(float(grad_norm))
        run.lrs.append(extra_metrics["lr"])
        log(step, loss, max_loss, grad_norm, extra_metrics=extra_metrics)

    def record_batches(data: Any) -> Iterator[Any]:
        for inputs, labels in generate(data):
            run.batches.append((inputs["input"].clone(), labels.clone()))
            yield inputs, labels

    run.trainer.metrics_processor.log = record_log
    run.trainer.batch_generator = record_batches
    return run


def train(folder: Path | str, *args: str, config: Path = CONFIG) -> Run:
    """Builds, trains to the end and closes."""
    run = build(folder, *args, config=config)
    finish(run)
    return run


def finish(run: Run) -> None:
    """Loads what there is, trains to the end and closes. The trainer's sleep for other ranks' sake is left out."""
    with mock.patch("torchtitan.train.time.sleep"):
        run.trainer.train()
    run.trainer.close()


def full_state(run: Run) -> dict[str, torch.Tensor]:
    """Every entry of this rank's model parts as full tensors, copied."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in {**run.trainer.checkpointer.run.model.base.state_dict(), **adapter_state(run)}.items()
    }


def adapter_state(run: Run) -> dict[str, torch.Tensor]:
    """This rank's adapters as full tensors, copied."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in run.trainer.checkpointer.run.model.adapters.state_dict().items()
    }
