"""One launch for many checks, of ranks that need not import anything (`forked_ranks.py`).

A checks file ends with `main(CHECKS)`: name -> function of a folder. Every rank runs all of them in order. A check
fails by raising, and may return figures (JSON). After a failure the ranks may be out of step, so the rest is not run.
"""

import json
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(file: str, *, ranks: int, folder: Path, checks: Sequence[str], timeout: float = 900) -> dict[str, Any]:
    """Runs the named checks of a file on as many ranks, and ends all of them once one fails.

    Returns:
        Check -> {"error": "" or what went wrong, "figures": what rank 0's function returned}.
    """
    import torch.distributed as dist
    from forked_ranks import start_ranks

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    elastic = dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # the store is not rank 0's
    log, ends = folder / "output.log", time.monotonic() + timeout
    processes = start_ranks([log] * ranks, store.port, _run, str(HERE / file), str(folder), *checks, **elastic)
    running = {process.sentinel: process for process in processes}
    while running:
        over = [running.pop(one) for one in connection.wait(running, max(0.1, ends - time.monotonic()))]  # type: ignore
        if not over or any(process.exitcode for process in over):
            for process in running.values():
                process.kill()
    output = log.read_text() + f"\n{file}: ended after {timeout} s" * (time.monotonic() > ends)
    verdicts = folder / "verdicts.json"
    found = json.loads(verdicts.read_text()) if verdicts.exists() else {}
    told = output.partition(" failed on rank ")[2] or output
    not_run = {"error": "not run: " + "\n".join(told.splitlines()[:60]), "figures": None}
    return {name: found.get(name, not_run) for name in checks}


def _run(file: str, *arguments: str) -> None:
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def main(checks: dict[str, Callable[[Path], Any]], start: Callable[[], None] | None = None) -> None:
    """Runs the checks named on the command line, on this rank.

    Args:
        start: Of the process group; `harness.start_process_group` if left out.
    """
    import torch.distributed as dist

    if start is None:
        from harness import start_process_group as start  # type: ignore[no-redef]
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    start()
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
