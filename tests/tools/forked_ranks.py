"""Ranks forked from a process that has imported everything: they start in a tenth of a second, not in ten."""

import multiprocessing
import multiprocessing.forkserver as forkserver
import os
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

TOOLS = Path(__file__).resolve().parent
PATHS = [TOOLS.parents[1], TOOLS.parent, TOOLS.parent / "distributed", TOOLS, TOOLS.parent / "titan03"]

_FORK = multiprocessing.get_context("forkserver")
_HAS_02 = version("torchtitan").startswith("0.2.")
_FORK.set_forkserver_preload(["forked_rank_imports" if _HAS_02 else "jobs03"])


def start_ranks(logs: list[Path], port: int, work: Callable[..., None], *args: Any, **env: str) -> list[BaseProcess]:
    """A process for each log, with the environment that torchrun gives.

    Args:
        logs: Where each rank writes; several may share a file.
        port: Of the store that ranks find each other by, on this machine.
        work: Called in each rank; of a module's own, so that it can be pickled, as are its arguments.
        env: Further variables.
    """
    # Python 3.11 passes no sys.path on; and what killed ranks leave is no news.
    paths = os.pathsep.join(map(str, PATHS))
    with mock.patch.dict(os.environ, PYTHONPATH=paths, PYTHONWARNINGS="ignore:resource_tracker"):
        forkserver.ensure_running()
    env |= dict(WORLD_SIZE=f"{len(logs)}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", OMP_NUM_THREADS="1")
    for log in logs:
        log.write_text("")
    processes: list[BaseProcess] = [
        _FORK.Process(target=_run, args=(str(log), env | dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}"), work, args))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    return processes


def _run(log: str, env: dict[str, str], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    work(*args)
