"""Two gloo ranks: what goes wrong on one of them is told by both, at once."""

import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import build, finish
from launch import main
from parity import DDP2, FSDP2, PP2, TP2
from safetensors.torch import load_file, save_file
from tiny_models import base_options

from lora_converter.adapted import adapted_modules, adapter_parameters
from lora_converter.peft import PeftAdapter, save_peft
from lora_converter.ranks import together

LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}


def refused(make: Callable[[], Any]) -> str:
    """The error of this rank; within seconds."""
    start = time.monotonic()
    try:
        make()
    except ValueError as error:
        assert time.monotonic() - start < 10
        return str(error)
    raise AssertionError("accepted")


def settings(folder: Path) -> None:
    """Machines with different TOML files, told before anything is built."""
    rank = dist.get_rank()
    options = [*base_options("llama3", folder.parents[1]), *FSDP2]
    message = refused(lambda: build(folder, *options, f"--lora.rank={4 + 4 * rank}", f"--debug.seed={7 + rank}"))
    assert message == (
        "debug.seed differs between ranks: 7 on rank 0; 8 on rank 1. lora.rank differs between ranks: 4 on rank 0; "
        "8 on rank 1. Give all machines the same."
    ), message
    # A rank with a seed would not take part in sharing that of rank 0.
    message = refused(lambda: build(folder, *options, *(["--debug.seed=None"] if rank else [])))
    assert message.startswith("debug.seed differs between ranks: 11 on rank 0; None on rank 1."), message


@contextmanager
def another_machine(folder: Path) -> Iterator[Path]:
    """Each rank works in a folder of its own, so that one relative path names other files on each."""
    before, own = os.getcwd(), folder / f"machine-{dist.get_rank()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        yield own
    finally:
        os.chdir(before)


def files(folder: Path) -> None:
    """Machines with one TOML file and different files."""
    rank, bases = dist.get_rank(), folder.parents[1]
    dump, hf = folder / "run", (bases / "llama3").resolve()
    with another_machine(folder) as own:
        options = [*base_options("llama3", bases), *FSDP2]
        factors = {"model.layers.0.self_attn.v_proj": (torch.ones(4, 64), torch.full((32, 4), float(rank)))}
        save_peft(PeftAdapter(factors, 4, 32.0, 0.0, False, ["v_proj"]), own / "adapter")
        message = refused(lambda: build(dump, *options, "--lora.initial_adapter_path=adapter"))
        assert message.startswith(
            "llama3/tiny: lora.initial_adapter_path: adapter (SHA-256) differs between ranks: '"
        ), message
        if rank == 1:
            shutil.rmtree(own / "adapter")
        message = refused(lambda: build(dump, *options, "--lora.initial_adapter_path=adapter"))
        assert message.startswith("Rank 1 of 2: lora.initial_adapter_path = 'adapter': there is no such"), message

        run = build(dump, *options)
        run.trainer.checkpointer.load()
        base = run.trainer.checkpointer.run.model.base.state_dict()
        state = {name: value.full_tensor() for name, value in base.items()}
        run.trainer.close()
        dcp.save(state, checkpoint_id=own / "base", no_dist=True)
        here = ["--checkpoint.no-initial_load_in_hf", "--checkpoint.initial_load_path=base"]
        if rank == 1:
            (own / "base" / "__0_0.distcp").unlink()
        run = build(dump, *options, *here)
        message = refused(run.trainer.checkpointer.load)
        run.trainer.close()
        assert message == (
            "Rank 1 of 2: checkpoint.initial_load_path: base is not complete: __0_0.distcp is missing."
        ), message

        weights = load_file(hf / "model.safetensors")
        weights["model.norm.weight"] += rank
        shutil.copytree(hf, own / "hf")
        save_file(weights, own / "hf" / "model.safetensors", metadata={"format": "pt"})
        run = build(dump, *options, *DDP2, "--checkpoint.initial_load_path=hf")
        message = refused(run.trainer.checkpointer.load)
        run.trainer.close()
        assert message.startswith("The fingerprint of the base differs between ranks: '"), message


def steps(folder: Path) -> None:
    """Machines with different steps of one run."""
    options = [*base_options("llama3", folder.parents[1]), *FSDP2]
    finish(build(folder / "shared", *options, "--training.steps=2"))
    dist.barrier()
    with another_machine(folder) as own:
        step = own / "run" / "checkpoint" / "step-2"
        shutil.copytree(folder / "shared" / "checkpoint" / "step-2", step)
        if dist.get_rank() == 1:
            (step / "lora.json").unlink()
        run = build(Path("run"), *options)
        message = refused(run.trainer.checkpointer.load)
        assert message.startswith("run/checkpoint/step-2/lora.json differs between ranks: Description("), message
        assert message.endswith("; None on rank 1. Give all machines the same."), message
        if dist.get_rank() == 1:
            shutil.rmtree(step)
        message = refused(run.trainer.checkpointer.load)
        run.trainer.close()
        assert message == (
            "The step to resume from in run/checkpoint differs between ranks: 2 on rank 0; -1 on rank 1. Give all "
            "machines the same."
        ), message


def bugs(folder: Path) -> None:
    """A mistake of the code's on one rank keeps its own error there, and stops the others at once."""

    def look_up() -> str:
        return {0: "a"}[dist.get_rank()]

    try:
        together(look_up)
    except KeyError as error:
        assert dist.get_rank() == 1 and "look_up" in "".join(traceback.format_tb(error.__traceback__))
    except RuntimeError as error:
        assert dist.get_rank() == 0 and str(error) == "Rank 1 of 2: KeyError(1)", error
    else:
        raise AssertionError("accepted")
    assert together(lambda: dist.get_rank()) == dist.get_rank()


class Messages(logging.Handler):
    """The errors that this rank logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def faults(folder: Path, layout: list[str]) -> None:
    """A learning rate of 0, a linear without gradient, and nan on one rank at step 4: what is said, and what is saved.

    Under PP the linear belongs to the second rank's stage, and the nan to the first one's.
    """
    quiet = "layers.3.attention.wq"
    steps = ["--training.steps=5", "--checkpoint.interval=3", "--optimizer.lr=0"]
    run = build(folder, *base_options("llama3", folder.parents[1]), *layout, *steps)
    linears = {linear.lora_fqn: linear for part in run.trainer.model_parts for linear in adapted_modules(part)}
    if quiet in linears:
        linears[quiet].lora_enabled = False
    train_step, messages, gathers = run.trainer.train_step, Messages(), []

    def poisoned(*args: Any) -> None:
        if run.trainer.step == 4 and dist.get_rank() == 0:
            param = next(iter(adapter_parameters(run.trainer.model_parts[0]).values())).data
            local = param.to_local() if hasattr(param, "to_local") else param
            local.view(-1)[0] = torch.nan
        gathers.append(0)
        train_step(*args)

    run.trainer.train_step = poisoned
    gather = dist.all_gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        if gathers:
            gathers[-1] += 1
        gather(*args, **kwargs)

    logging.getLogger().addHandler(messages)
    try:
        with mock.patch("torch.distributed.all_gather_object", counted):
            finish(run)
    finally:
        logging.getLogger().removeHandler(messages)
    first, zero, *rest = messages.texts
    assert first == (
        f"LoRA: step 1: 1 adapters got no gradient in the whole step; is their part of the model used?: {quiet}."
    ), first
    assert zero.startswith("LoRA: step 3: 28 adapters are still zero, so they change nothing; is the learning"), zero
    broken, unsaved = rest
    assert broken.startswith("LoRA: step 4: 27 adapters hold nan or inf: ") and quiet not in broken, broken
    assert unsaved == "LoRA: step 5 is not saved: its adapters hold nan or inf. Older steps stay.", unsaved
    assert sorted(os.listdir(folder / "checkpoint")) == ["step-3"]
    assert gathers[0] > 0 == gathers[1], gathers  # nothing is looked at, or waited for, in a step between


def shards(folder: Path) -> None:
    """An adapter is zero if all of it is: a rank may hold rows that are."""
    run = build(folder, *base_options("llama3", folder.parents[1]), *FSDP2)
    watch = run.trainer.checkpointer.run.faults
    linears = {linear.lora_fqn: linear for linear in adapted_modules(run.trainer.model_parts[0])}
    half, whole = "layers.0.attention.wq", "layers.2.attention.wk"
    with torch.no_grad():
        for fqn, linear in linears.items():
            zero = fqn == whole or (fqn == half and dist.get_rank() == 1)
            linear.lora_b.weight.to_local().fill_(0.0 if zero else 1.0)
    messages = Messages()
    logging.getLogger().addHandler(messages)
    try:
        watch._steps = 1  # a first step may leave zeros
        assert watch.after_step(2, saves=True)
    finally:
        logging.getLogger().removeHandler(messages)
    assert [text for text in messages.texts if "still zero" in text] == [
        f"LoRA: step 2: 1 adapters are still zero, so they change nothing; is the learning rate above 0?: {whole}."
    ], messages.texts
    run.trainer.close()


CHECKS: dict[str, Callable[[Path], Any]] = {
    "machines with different settings": settings,
    "machines with different files": files,
    "machines with different steps": steps,
    "a mistake of the code's on one rank": bugs,
    "shards of zeros": shards,
    **{
        f"faults under {name}": lambda folder, layout=layout: faults(folder, layout) for name, layout in LAYOUTS.items()
    },
}

if __name__ == "__main__":
    main(CHECKS)
