"""Two torchrun agents with a c10d rendezvous, as on two machines, here on one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, TINY_ARGS

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_agents_train_one_job(tmp_path: Path) -> None:
    rendezvous = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_id=lora",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{free_port()}",
    ]
    job = [
        "--job.config_file=configs/debug_lora.toml",
        *(argument for argument in TINY_ARGS if "flavor" not in argument),
        "--checkpoint.initial_load_path=",
        f"--job.dump_folder={tmp_path}",
        "--training.steps=2",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "lora_converter.train", *job]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    agents = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    logs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(logs)
    assert all("dp_shard=2" in log and "step:  2" in log for log in logs), "\n".join(logs)
    assert (tmp_path / "checkpoint" / "step-2" / ".metadata").exists()
