"""One torchrun for many checks: a start costs seconds, nearly all of it imports.

A checks file ends with `main(CHECKS)`: name -> function of a folder. Every rank runs all of them in order. A check
fails by raising, and may return figures (JSON). After a failure the ranks may be out of step, so the rest is not run.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATHS = [HERE.parents[1], HERE.parent, HERE]


def launch(file: str, *, ranks: int, folder: Path, checks: Sequence[str], timeout: float = 900) -> dict[str, Any]:
    """Runs the named checks of a file under torchrun.

    Returns:
        Check -> {"error": "" or what went wrong, "figures": what rank 0's function returned}.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, PATHS)))
    result = subprocess.run(
        [*command, str(HERE / file), str(folder), *checks], env=env, capture_output=True, text=True, timeout=timeout
    )
    output = result.stdout + result.stderr
    (folder / "output.log").write_text(output)
    verdicts = folder / "verdicts.json"
    found = json.loads(verdicts.read_text()) if verdicts.exists() else {}
    told = output.partition(" failed on rank ")[2] or output
    not_run = {"error": "not run: " + "\n".join(told.splitlines()[:60]), "figures": None}
    return {name: found.get(name, not_run) for name in checks}


def main(checks: dict[str, Callable[[Path], Any]]) -> None:
    """Runs the checks named on the command line, on this rank."""
    import torch.distributed as dist
    from harness import start_process_group

    folder, names = Path(sys.argv[1]), sys.argv[2:]
    start_process_group()
    verdicts: dict[str, Any] = {}
    for name in names:
        error, figures = "", None
        try:
            figures = checks[name](folder / name)
        except Exception:
            error = f"rank {dist.get_rank()}:\n{traceback.format_exc()}"
            print(f"{name} failed on {error}", file=sys.stderr, flush=True)  # the gather may meet another collective
        gathered: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(gathered, error)
        verdicts[name] = {"error": "\n".join(filter(None, gathered)), "figures": figures}
        if dist.get_rank() == 0:
            (folder / "verdicts.json").write_text(json.dumps(verdicts))
        if verdicts[name]["error"]:
            break
    dist.barrier()
    dist.destroy_process_group()
