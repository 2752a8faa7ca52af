"""One torchrun for many checks: a start costs seconds, nearly all of it imports.

A checks file defines functions `check_<claim>(folder)` and ends with `main(globals())`. Every rank runs all of them
in order; rank 0 writes one verdict per check. After a failure the ranks may be out of step, so the rest is not run.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [HERE.parents[1], HERE.parent, HERE]


def check_names(file: str) -> list[str]:
    """The checks that a file defines, in order, without importing it."""
    lines = (HERE / file).read_text().splitlines()
    return [line[4:].split("(")[0] for line in lines if line.startswith("def check_")]


def launch(file: str, ranks: int, folder: Path, timeout: float = 900) -> dict[str, str]:
    """Runs the checks of a file under torchrun.

    Returns:
        Check -> "ok", or what went wrong.
    """
    verdicts = folder / "verdicts.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, PATHS)))
    result = subprocess.run(
        [*command, str(HERE / file), str(folder)], env=env, capture_output=True, text=True, timeout=timeout
    )
    (folder / "output.log").write_text(result.stdout + result.stderr)
    found = json.loads(verdicts.read_text()) if verdicts.exists() else {}
    tail = "\n".join((result.stdout + result.stderr).splitlines()[-60:])
    return {name: found.get(name, f"not run\n{tail}") for name in check_names(file)}


def main(namespace: dict[str, Callable]) -> None:
    """Runs every `check_` function of a checks file on this rank."""
    import torch.distributed as dist
    from harness import start_process_group

    folder = Path(sys.argv[1])
    start_process_group()
    verdicts: dict[str, str] = {}
    for name, function in [(n, f) for n, f in namespace.items() if n.startswith("check_")]:
        error = ""
        try:
            function(folder / name)
        except Exception:
            error = f"rank {dist.get_rank()}:\n{traceback.format_exc()}"
        gathered: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(gathered, error)
        verdicts[name] = "\n".join(filter(None, gathered)) or "ok"
        if dist.get_rank() == 0:
            (folder / "verdicts.json").write_text(json.dumps(verdicts))
        if verdicts[name] != "ok":
            print(verdicts[name], file=sys.stderr)
            break
    dist.barrier()
    dist.destroy_process_group()
