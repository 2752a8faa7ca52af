"""Plans of jobs in a process of its own: the trainer of a plan has a process group without other processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lora_converter.plan import Estimate

ROOT = Path(__file__).parents[2]


def planned(*jobs: tuple[str, list[str], int, bool]) -> list[Estimate]:
    """The estimates of rank 0 of jobs: TOML file, options, GPUs, and whether with CUDA's kernels. Tiny models too."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, __file__, json.dumps(jobs)]
    run = subprocess.run(command, env=dict(os.environ, PYTHONPATH=paths), capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return [Estimate(**found) for found in json.loads(run.stdout.splitlines()[-1])]


def main() -> None:
    """Prints them as JSON."""
    import harness  # noqa: F401  has the flavors
    import tiny_models  # noqa: F401

    from lora_converter.titan.plan import job_without_files
    from lora_converter.titan.plan_trainer import estimate

    found = []
    for path, options, gpus, as_on_cuda in json.loads(sys.argv[1]):
        found.append(estimate(job_without_files(path, options), gpus=gpus, as_on_cuda=as_on_cuda))
    print(json.dumps([vars(one) for one in found]))


if __name__ == "__main__":
    main()
