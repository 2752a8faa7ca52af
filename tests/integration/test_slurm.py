"""The Slurm script of docs/cluster.md, run by stand-ins for Slurm's own commands: preempted, requeued, at its end."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_job import ROOT, SMALL, make_base

SRUN = """
ranks=(); trap 'kill -USR1 "${ranks[@]}"' USR1
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" >> "$LOGS/rank-$i.log" 2>&1 & ranks+=($!)
done
code=0
for rank in "${ranks[@]}"; do
    wait "$rank"; c=$?
    while kill -0 "$rank" 2> /dev/null; do wait "$rank"; c=$?; done
    [ $c -gt $code ] && code=$c
done
exit $code
"""
"""Starts the tasks, hands the signal to them, and ends with their highest exit code, as srun does."""

SCONTROL = """
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$LOGS/scontrol.log"; fi
"""


def script(folder: Path, *options: str) -> Path:
    """The block of the page, with our job and without the lines that only Slurm reads."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    text = next(block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if "--signal" in block)
    job = f"{ROOT}/configs/debug_lora.toml {' '.join(options)}"
    assert text.count("configs/llama3_70b_lora.toml") == 1 and text.count("exec python ") == 1
    text = text.replace("configs/llama3_70b_lora.toml", job).replace("exec python ", f"exec {sys.executable} ")
    (folder / "job.sh").write_text(text)
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    return folder / "job.sh"


@pytest.mark.slow
def test_the_slurm_script_requeues_a_preempted_job_and_the_next_launch_ends_it(tmp_path: Path) -> None:
    small = [option for option in SMALL if "flavor" not in option]
    sizes = ["--training.local_batch_size=2", "--training.steps=30", "--checkpoint.interval=100"]
    base = make_base(tmp_path / "base", "--model.flavor=debugmodel")
    options = [*small, *sizes, f"--checkpoint.initial_load_path={base}", f"--job.dump_folder={tmp_path}/run"]
    job = script(tmp_path, *options, "--checkpoint.no-last_save_model_only")
    number = os.getpid()
    env = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", LOGS=f"{tmp_path}", OMP_NUM_THREADS="1")
    env |= dict(SLURM_JOB_ID=f"{number}", SLURM_NTASKS="2", SLURM_JOB_NODELIST="localhost")
    log = tmp_path / "rank-0.log"

    def launch() -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(job)], env=env, text=True, start_new_session=True)

    process = launch()
    while "step:  5 " not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)
    subprocess.run(["pkill", "-USR1", "-x", "srun"], check=True)
    assert process.wait(60) == 138
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {number}\n"
    stopped_at = int(re.findall(r"the run ends after step (\d+)", log.read_text())[0])
    assert launch().wait(120) == 0
    assert f"Training starts at step {stopped_at + 1}" in log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {number}\n"
