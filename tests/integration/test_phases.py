"""All weights first, then adapters on the result, in one job; killed anywhere and launched again."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import CONFIG, ROOT, TINY_ARGS, Trainer, build, parse, start_process_group
from torch.distributed.checkpoint import FileSystemReader

from lora_converter.titan.job_config import full_phase_result
from lora_converter.titan.metrics import log_phase
from lora_converter.titan.phases import full_phase_config, run_full_phase

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
PHASES = ["--checkpoint.initial_load_path=", "--lora.full_phase.steps=4", "--lora.full_phase.lr=1e-3"]


def test_the_model_at_the_switch_is_one_model_and_the_rest_is_fresh(tmp_path: Path) -> None:
    start_process_group()
    config = parse(tmp_path, *PHASES)
    first = Trainer(full_phase_config(config))
    first.train()
    assert {name for name, p in first.model_parts[0].named_parameters() if not p.requires_grad} == set()
    with torch.no_grad():
        before = first.model_parts[0](TOKENS)
    first.close()
    second = build(tmp_path, *PHASES, f"--checkpoint.initial_load_path={full_phase_result(config)}")
    second.trainer.checkpointer.load()
    with torch.no_grad():
        assert torch.equal(second.trainer.model_parts[0](TOKENS), before)
    assert second.trainer.step == 0 and not second.trainer.optimizers.optimizers[0].state
    assert first.lr_schedulers.schedulers[0].base_lrs[0] == 1e-3
    assert second.trainer.lr_schedulers.schedulers[0].base_lrs[0] == 3e-3
    second.trainer.train()
    assert len(second.losses) == 3 and second.losses[-1] != second.losses[0]
    second.trainer.close()


def test_the_phase_is_in_the_metrics() -> None:
    class Processor:
        def log(self, step: int, extra_metrics: dict | None = None) -> None:
            self.seen = (step, extra_metrics)

    class Run:
        metrics_processor = Processor()

    log_phase(Run, 2)
    Run.metrics_processor.log(5, extra_metrics={"lr": 1.0})
    assert Run.metrics_processor.seen == (5, {"lr": 1.0, "lora/phase": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora.full_phase.steps=3", "--lora.save_merged", "--checkpoint.initial_load_path=/"],
            "lora.save_merged = true with lora.full_phase: the adapters' base is that phase's result, a DCP folder",
        ),
        (
            ["--lora.full_phase.steps=3"],
            "lora.full_phase.steps = 3: torchtitan's own entry trains one phase. Start the",
        ),
        (
            ["--lora.full_phase.steps=3", "--checkpoint.no-enable"],
            "lora.full_phase hands its result on as a checkpoint: set checkpoint.enable = true.",
        ),
        (
            [
                *("--lora.full_phase.steps=3", "--checkpoint.initial_load_path=/", "--checkpoint.initial_load_in_hf"),
                "--parallelism.tensor_parallel_degree=2",
            ],
            "lora.full_phase with checkpoint.initial_load_in_hf = true under FSDP2 x TP: torchtitan 0.2.2 loads",
        ),
    ],
)
def test_a_job_of_two_phases_that_cannot_work_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    from lora_converter.titan.converter import LoRAConverter

    with pytest.raises(ValueError) as error:
        LoRAConverter(parse(tmp_path, "--checkpoint.initial_load_path=", *options), None)
    assert str(error.value).startswith(message)


def test_a_wrong_target_is_told_before_the_first_phase(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules: 'wkv' matches no linear"):
        run_full_phase(parse(tmp_path, *PHASES, "--lora.target_modules=wkv"))
    assert not list(tmp_path.iterdir())


STEPS = 12
EVENTS = ("LoRA: phase", "LoRA: loading", "LoRA: resuming", "step:", "Saving the checkpoint")
"""What the log shows of the job's progress, both phases and the switch between them."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(folder: Path, ranks: int, *options: str) -> subprocess.Popen[str]:
    """The job as a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else [])]  # which takes seconds, and one rank can do without
    command += ["-m", "lora_converter.train", "--job.config_file", str(CONFIG), *TINY_ARGS, *PHASES]
    command += ["--model.flavor=debugmodel", f"--training.local_batch_size={4 // ranks or 1}"]
    command += [f"--training.steps={STEPS}", "--training.global_batch_size=4", "--checkpoint.interval=1"]
    command += ["--checkpoint.keep_latest_k=0", f"--job.dump_folder={folder}", *options]
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env = dict(os.environ, OMP_NUM_THREADS="1", **(alone if ranks == 1 else {}))
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill(folder: Path) -> None:
    """SIGKILL to the launcher and to all ranks, which it starts in sessions of their own: all name the folder."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(folder).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "checkpoint" / f"step-{STEPS}"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name for name in stored if name.endswith((".lora_a.weight", ".lora_b.weight"))]
    found = {name: torch.empty(stored[name].size) for name in names if not name.startswith("optimizer")}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


def train_with_kills(folder: Path, ranks: int, moments: list[int], *options: str) -> list[int]:
    """Launches until the job ends by itself; each of the first launches is killed a little after a moment of its own.

    Args:
        moments: Lines of progress, counted from a launch on; every rank writes its own.

    Returns:
        The phase of each kill.
    """
    rng, killed = random.Random(0), []
    while True:
        process, progress, log = launch(folder, ranks, *options), [], []
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            progress += [line] * any(event in line for event in EVENTS)
            if len(killed) < len(moments) and len(progress) == moments[len(killed)]:
                killed.append(2 if any("phase 2 of 2" in seen for seen in progress) else 1)
                time.sleep(rng.uniform(0, 0.2))
                kill(folder)
                break
        else:
            process.communicate()
            assert process.returncode == 0 and len(killed) == len(moments), "".join(log)[-3000:]
            return killed
        process.communicate()


@pytest.mark.parametrize(
    ("ranks", "moments", "options"),
    [
        (1, random.Random(0).choices(range(1, 7), k=12), []),
        (4, [10, 70], ["--parallelism.tensor_parallel_degree=2"]),
    ],
    ids=["1 rank", "FSDP2 x TP2"],
)
def test_killed_anywhere_it_ends_where_it_would_have_ended(
    ranks: int, moments: list[int], options: list[str], tmp_path: Path
) -> None:
    train_with_kills(tmp_path / "whole", ranks, [], *options)
    killed = train_with_kills(tmp_path / "killed", ranks, moments, *options)
    whole, pieces = (adapter_of(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 84 and whole.keys() == pieces.keys()
    assert set(killed) == {1, 2}
    for name, value in whole.items():
        if ranks == 1:
            assert torch.equal(value, pieces[name]), (name, killed)
        else:
            torch.testing.assert_close(value, pieces[name], rtol=1e-5, atol=1e-5)
