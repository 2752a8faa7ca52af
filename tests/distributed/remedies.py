"""Two gloo ranks: what a message to several machines says to do is done, and the job goes on on all of them."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import BASE_CONFIG, Run, adapter_state, build, finish, full_state, parse, train
from launch import main
from parity import DDP2, FSDP2, TP2, losses_of
from safetensors.torch import load_file, save_file
from tiny_models import base_options
from trouble import another_machine, refused

from lora_converter.peft import PeftAdapter, save_peft
from lora_converter.run import claim
from lora_converter.titan.job import full_phase_result
from lora_converter.titan.phases import run_full_phase

STEPS = "--training.steps=2"


def loaded(folder: Path, *options: str) -> Run:
    run = build(folder, *options)
    run.trainer.checkpointer.load()
    run.trainer.close()
    return run


def loading(folder: Path, *options: str) -> str:
    """What is said when the job of these options loads."""
    run = build(folder, *options)
    message = refused(run.trainer.checkpointer.load)
    run.trainer.close()
    return message


def trains(folder: Path, *options: str) -> list[float]:
    run = build(folder, *options)
    finish(run)
    losses = losses_of(run)
    assert losses and all(map(math.isfinite, losses)), losses
    return losses


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def settings(folder: Path) -> None:
    options = [*base_options("llama3", folder.parents[1]), *FSDP2, STEPS]
    expected = trains(folder / "expected", *options)
    message = refused(lambda: build(folder / "run", *options, f"--lora.rank={4 + 4 * dist.get_rank()}"))
    assert message == ("lora.rank differs between ranks: 4 on rank 0; 8 on rank 1. Give all machines the same."), (
        message
    )
    assert trains(folder / "run", *options, "--lora.rank=4") == expected


def adapters(folder: Path) -> None:
    """Another one on rank 1, and then none."""
    rank, dump = dist.get_rank(), folder / "run"
    options = [*base_options("llama3", folder.parents[1]), *FSDP2, STEPS, "--lora.initial_adapter_path=adapter"]
    factors = {"model.layers.0.self_attn.v_proj": (torch.ones(4, 64), torch.full((32, 4), 0.5))}
    adapter = PeftAdapter(factors, 4, 32.0, 0.0, False, ["v_proj"])
    with another_machine(folder) as own:
        for trouble in ("another", "none"):
            save_peft(adapter, own / "adapter", replace=True)
            if rank == 1 and trouble == "another":
                other = {"model.layers.0.self_attn.v_proj": (torch.ones(4, 64), torch.ones(32, 4))}
                save_peft(PeftAdapter(other, 4, 32.0, 0.0, False, ["v_proj"]), own / "adapter", replace=True)
            elif rank == 1:
                shutil.rmtree(own / "adapter")
            message = refused(lambda: build(dump, *options))
            told = "Give all machines the same." if trouble == "another" else "Name a step folder or a PEFT directory."
            assert message.endswith(told), message
            dist.barrier()
            if rank == 1:
                shutil.rmtree(own / "adapter", ignore_errors=True)
                shutil.copytree(folder / "machine-0" / "adapter", own / "adapter")
            found = adapter_state(loaded(dump, *options))
            assert found["layers.0.attention.wv.lora_b.weight"].eq(0.5).all() and len(found) == 2, found.keys()
        trains(dump, *options)


def bases(folder: Path) -> None:
    """A file of a DCP base is gone on rank 1; a Hugging Face base is another one there."""
    rank, hf = dist.get_rank(), (folder.parents[1] / "llama3").resolve()
    options = [*base_options("llama3", folder.parents[1]), STEPS]
    expected = trains(folder / "expected", *options, *FSDP2)
    converted = convert(folder / "converted", *options, *FSDP2)
    with another_machine(folder) as own:
        shutil.copytree(converted, own / "base")
        file = own / "base" / "__1_0.distcp"
        here = ["--checkpoint.no-initial_load_in_hf", "--checkpoint.initial_load_path=base", *FSDP2]
        if rank == 1:
            file.rename(own / "away")
        message = loading(folder / "dcp", *options, *here)
        assert message.startswith("Rank 1 of 2: ") and message.endswith("__1_0.distcp is missing."), message
        if rank == 1:
            (own / "away").rename(file)
        assert trains(folder / "dcp", *options, *here) == expected

        weights = load_file(hf / "model.safetensors")
        weights["model.norm.weight"] += rank
        shutil.copytree(hf, own / "hf")
        save_file(weights, own / "hf" / "model.safetensors", metadata={"format": "pt"})
        there = [*DDP2, "--checkpoint.initial_load_path=hf"]
        assert loading(folder / "hf", *options, *there).endswith("Give all machines the same.")
        shutil.copyfile(hf / "model.safetensors", own / "hf" / "model.safetensors")
        assert math.isclose(trains(folder / "hf", *options, *there)[0], expected[0], rel_tol=1e-6)


def convert(folder: Path, *options: str) -> Path:
    """A base as a DCP folder, as the message says: a job without "lora" and TP, one step with optimizer.lr = 0."""
    job = [option for option in options if not option.startswith("--lora")]
    train(folder, *job, "--training.steps=1", "--optimizer.lr=0", config=BASE_CONFIG)
    dist.barrier()
    return folder / "checkpoint" / "step-1"


def steps(folder: Path) -> None:
    """A description, and then a whole step, that rank 1 has not."""
    options = [*base_options("llama3", folder.parents[1]), *FSDP2, "--training.steps=3"]
    job = [*options, "--lr_scheduler.total_steps=3"]
    first = build(folder / "shared", *job, STEPS)
    finish(first)
    dist.barrier()
    with another_machine(folder) as own:
        step = own / "run" / "checkpoint" / "step-2"
        for lost in (step / "lora.json", step):
            shutil.rmtree(own / "run", ignore_errors=True)
            shutil.copytree(folder / "shared" / "checkpoint" / "step-2", step)
            if dist.get_rank() == 1:
                shutil.move(lost, own / "away")
            message = loading(Path("run"), *job, "--checkpoint.load_only")  # else the folder is to be shared
            assert message.endswith("Give all machines the same."), message
            if dist.get_rank() == 1:
                shutil.move(own / "away", lost)
            again = loaded(Path("run"), *job, "--checkpoint.load_only")
            assert again.trainer.step == 2 and same(adapter_state(again), adapter_state(first))


def storage(folder: Path) -> None:
    """job.dump_folder on each machine's own disk, and then where all machines see it."""
    job = [*base_options("llama3", folder.parents[1]), *FSDP2, STEPS]
    expected = trains(folder / "expected", *job)
    with another_machine(folder), mock.patch.object(claim, "_VISIBLE_AFTER", 0.3):
        message = loading(Path("run"), *job)
    assert message.endswith("cannot be resumed: put job.dump_folder on storage that all machines share."), message
    assert trains(folder / "shared", *job) == expected


def another_degree(folder: Path) -> None:
    """docs/parallelism.md: torchtitan's data loader alone wants the same data-parallel degree, or is left out."""
    options = [*base_options("llama3", folder.parents[1]), "--training.steps=3", "--lr_scheduler.total_steps=3"]
    first = build(folder, *options, *FSDP2, STEPS)
    finish(first)
    message = loading(folder, *options, *TP2)
    assert "could not be read: dp_degree is inconsistent before and after checkpoint" in message, message
    out = "--checkpoint.exclude_from_loading=dataloader"
    again = loaded(folder, *options, *TP2, out)
    assert again.trainer.step == 2 and same(full_state(again), full_state(first))
    assert len(trains(folder, *options, *TP2, out)) == 1


def float8(folder: Path) -> None:
    """Tensorwise float8 under TP is refused; rowwise trains, and rounds the loss of the job without float8."""
    plain = [*base_options("llama3", folder.parents[1]), *TP2, STEPS]
    options = [*plain, "--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate"]
    message = refused(lambda: build(folder / "run", *options))
    assert message.endswith('Set quantize.linear.float8.recipe_name = "rowwise".'), message
    expected = trains(folder / "plain", *plain)
    found = trains(folder / "run", *options, "--quantize.linear.float8.recipe_name=rowwise")
    assert found != expected and all(math.isclose(*pair, rel_tol=1e-2) for pair in zip(found, expected, strict=True))


def two_phases(folder: Path) -> None:
    """A Hugging Face base is converted first; phase 1 at a rate of nearly nothing hands on that base."""
    options = base_options("llama3", folder.parents[1])
    phases = ["--lora.full_phase.steps=1", "--lora.full_phase.lr=1e-30", *TP2, STEPS]
    message = refused(lambda: run_full_phase(parse(folder / "run", *options, *phases)))
    assert " Convert the base to DCP first: " in message, message
    converted = convert(folder / "converted", *options, *FSDP2)
    base = [f"--checkpoint.initial_load_path={converted}", *phases]
    config = parse(folder / "run", *base)
    with mock.patch("torchtitan.train.time.sleep"):
        run = build(folder / "run", *base, *run_full_phase(config))
    assert os.path.isdir(full_phase_result(config))
    run.trainer.checkpointer.load()
    assert same(full_state(run), full_state(loaded(folder / "plain", *options, *TP2)))
    finish(run)
    assert len(run.losses) == 2


CHECKS: dict[str, Callable[[Path], Any]] = {
    "the same settings on all machines": settings,
    "the same adapter on all machines": adapters,
    "the same base on all machines": bases,
    "the same steps on all machines": steps,
    "a dump folder that all machines see": storage,
    "a data loader of another data-parallel degree": another_degree,
    "rowwise float8 under tensor parallelism": float8,
    "a converted base for two phases under tensor parallelism": two_phases,
}

if __name__ == "__main__":
    main(CHECKS)
