"""What `lora-converter plan` says to do is done, and there is a plan. One process for all commands."""

import json
import os
import re
import subprocess
import sys

import pytest
from harness import ROOT

JOB = str(ROOT / "configs" / "debug_lora.toml")
SMALL = ["--training.seq_len=64", "--training.local_batch_size=1"]
TP4 = "--parallelism.tensor_parallel_degree=4"
EP4 = ["--model.name=deepseek_v3", "--model.flavor=debugmodel", "--parallelism.expert_parallel_degree=4"]

TROUBLES = {
    "there is no such file. Name the TOML file of a job.": (["nothing.toml"], [JOB]),
    "--gpus 6: the layout (tp 4) takes a multiple of 4. Give one, or change [parallelism].": (
        [JOB, "--gpus", "6", TP4],
        [JOB, "--gpus", "8", TP4],
    ),
    "--gpus 6: the layout (dp_shard 4) takes 4. Give that, or set parallelism.data_parallel_shard_degree = -1, which "
    "takes the GPUs that are left.": (
        [JOB, "--gpus", "6", "--parallelism.data_parallel_shard_degree=4"],
        [JOB, "--gpus", "6", "--parallelism.data_parallel_shard_degree=-1"],
    ),
    "--gpus 6: the layout (ep 4) takes a multiple of 4. Give one, or change [parallelism].": (
        [JOB, "--gpus", "6", *EP4],
        [JOB, *EP4],
    ),
    "training.enable_cpu_offload = true: a plan counts everything on the GPU. Set it to false.": (
        [JOB, "--training.enable_cpu_offload"],
        [JOB, "--training.no-enable_cpu_offload"],
    ),
    "This job cannot be run on fake tensors (AssertionError: Sequence length 66 must be divisible by": (
        [JOB, "--gpus", "4", TP4, "--training.seq_len=66"],
        [JOB, "--gpus", "4", TP4, "--training.seq_len=72"],
    ),
    "model.flavor = '9B': llama3 has debugmodel, ": ([JOB, "--model.flavor=9B"], [JOB, "--model.flavor=debugmodel"]),
    ". Name one of them.": ([JOB, "--model.flavor=9B"], [JOB, "--model.flavor=debugmodel"]),
}
"""Message -> a command that gives it, and the one that it asks for."""

REFUSED = {
    "--memory 0: must be above 0, the GiB of one GPU.": [JOB, "--memory", "0"],
    "parallelism.tensor_parallel_degree = 0: must be at least 1.": [JOB, "--parallelism.tensor_parallel_degree=0"],
    "parallelism.expert_parallel_degree = 4: the 2 ranks of dp_shard x cp x tp must be a multiple of it": [
        JOB,
        "--parallelism.data_parallel_shard_degree=2",
        *EP4,
    ],
    'depends on the folder of the base, and none is read here, as in every plan. Set "nf4", or in a job ': [
        JOB,
        "--lora.base_format=as-released",
    ],
    "is no TOML file: Expected '=' after a key": [f"{ROOT}/README.md"],
}
"""Messages that say what is allowed, or what went wrong."""

TOO_LARGE = [JOB, "--memory", "0.02"]
OF_DENSE_WEIGHTS = [*TOO_LARGE, "--lora.use_dora"]


def small(command: list[str]) -> list[str]:
    """With few tokens, unless it says how many."""
    return [command[0], *SMALL, *command[1:]]


RUNS = """
import contextlib, io, json, sys
from lora_converter.cli import main
found = []
for command in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(["plan", *command])
    found.append((code, out.getvalue(), error.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, str, str]]:
    """JSON of a command's arguments -> exit code, output, errors."""
    commands = [small(command) for pair in TROUBLES.values() for command in pair] + [
        *REFUSED.values(),
        small(TOO_LARGE),
        small(OF_DENSE_WEIGHTS),
    ]
    once = {json.dumps(command): command for command in commands}
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(list(once.values()))], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(once, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("message", TROUBLES)
def test_what_a_message_asks_for_leads_to_a_plan(message: str, found: dict[str, tuple[int, str, str]]) -> None:
    trouble, remedy = map(small, TROUBLES[message])
    code, _, error = found[json.dumps(trouble)]
    assert code == 1 and message in error and "Traceback" not in error
    code, plan, error = found[json.dumps(remedy)]
    assert code == 0 and "peak" in plan and "Fits in 80 GiB" in plan, error


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_said(message: str, found: dict[str, tuple[int, str, str]]) -> None:
    code, _, error = found[json.dumps(REFUSED[message])]
    assert code == 1 and message in error and "Traceback" not in error


def test_what_would_change_a_job_that_does_not_fit_is_shown_with_its_numbers(
    found: dict[str, tuple[int, str, str]],
) -> None:
    """A packed base among it: of this model 42 linears, not the embedding and the head."""
    lines = variations(found[json.dumps(small(TOO_LARGE))])
    names = ["packed base (nf4)", "FSDP 2, 2 GPUs", "TP 2, 2 GPUs", "full AC", "sequence 32"]
    assert [line[2:24].rstrip() for line in lines] == names
    figures = [re.search(r"kept +[\d.]+, peak +([\d.]+), .* = base ([\d.]+)", line) for line in lines]
    peaks, bases = zip(*(map(float, figure.groups()) for figure in figures if figure), strict=True)
    assert len(peaks) == 5 and peaks[0] < peaks[-1]
    assert bases[0] < bases[-1]
    lines = variations(found[json.dumps(small(OF_DENSE_WEIGHTS))])
    assert [line[2:24].rstrip() for line in lines] == names[1:] and all("kept" in line for line in lines)


def variations(found: tuple[int, str, str]) -> list[str]:
    code, plan, error = found
    assert code == 0 and "Does not fit in 0.02 GiB" in plan, error
    return plan.partition("What would change it:\n")[2].partition("\n\n")[0].splitlines()
