"""Jobs whose ranks are forked from a process that has imported everything: a launch takes a second, and can be killed.

What runs in a rank is `python -m lora_converter.train`, from its first line on. The model flavor "torture" is a tiny
Llama.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

from forked_ranks import start_ranks

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "--model.flavor=torture",
    f"--model.hf_assets_path={ROOT}/tests/assets/tokenizer",
    f"--training.dataset_path={ROOT}/tests/assets/c4_test",
    "--training.seq_len=64",
    "--debug.seed=11",
)
"""Options that make a debug job a small one."""


class ForkedJob:
    """A job that is launched, killed and launched again.

    Args:
        folder: Its dump folder; logs go there too.
        config: TOML file.
        options: Command line.
    """

    def __init__(self, folder: Path, ranks: int, config: str, options: Sequence[str]):
        self.folder, self.ranks, self._launches = folder, ranks, 0
        self.arguments = ["--job.config_file", str(ROOT / "configs" / config), *SMALL, *options]
        self.arguments.append(f"--job.dump_folder={folder}")

    def launch(self, *options: str, inside: Callable[[], None] | None = None) -> None:
        """Starts the ranks, with further options for this launch.

        Args:
            inside: Called in each rank before the job begins; of a module's own, so that it can be pickled.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._launches += 1
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        logs = [self._log(rank) for rank in range(self.ranks)]
        self._processes = start_ranks(logs, port, _train, [*self.arguments, *options], inside)

    @property
    def pid(self) -> int:
        """Of rank 0."""
        return self._processes[0].pid  # type: ignore[return-value]

    @property
    def failed(self) -> bool:
        """Whether a rank has ended badly, or was killed."""
        return any(process.exitcode for process in self._processes)

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for process in self._processes:
            process.kill()
        self.exit_codes()

    def wait_for_death(self) -> None:
        """Waits until a rank is killed, and kills the others, as torchrun does.

        Raises:
            RuntimeError: It ended in another way; with the end of its log.
        """
        connection.wait([process.sentinel for process in self._processes])
        codes = [process.exitcode for process in self._processes]
        self.kill()
        for rank, code in enumerate(codes):
            if code not in (None, -signal.SIGKILL):
                raise RuntimeError(f"Rank {rank} ended with {code}:\n{self._log(rank).read_text()[-3000:]}")

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to some ranks; to all if left out. Those that have ended get none."""
        for rank in range(self.ranks) if ranks is None else ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, number)

    def exit_codes(self) -> list[int]:
        """Waits for all ranks."""
        for process in self._processes:
            process.join()
        return [process.exitcode for process in self._processes]

    def run(self) -> None:
        """Launches and waits for a good end.

        Raises:
            RuntimeError: A rank failed; with the end of its log.
        """
        self.launch()
        self.end()

    def end(self) -> None:
        """Waits for a good end.

        Raises:
            RuntimeError: A rank failed; with the end of its log.
        """
        for rank, process in enumerate(self._processes):
            process.join()
            if process.exitcode:
                self.kill()
                raise RuntimeError(f"Rank {rank} failed:\n{self._log(rank).read_text()[-3000:]}")

    def wait(self, reached: Callable[[str], bool]) -> bool:
        """Waits until rank 0's log has got somewhere; False if the job has ended before."""
        while not reached(self.text()):
            if not any(process.is_alive() for process in self._processes):
                return False
            time.sleep(0.002)
        return True

    def text(self) -> str:
        """What rank 0 has logged in this launch."""
        path = self._log(0)
        return path.read_text() if path.exists() else ""

    def trained_to(self) -> int:
        """The last step that rank 0 has logged in this launch; 0 if none."""
        return max((int(number) for number in re.findall(r"step: +(\d+)", self.text())), default=0)

    def _log(self, rank: int) -> Path:
        return self.folder / f"launch-{self._launches}.rank-{rank}.log"


def make_base(folder: Path, *options: str) -> Path:
    """A base for other jobs, with random weights: the DCP folder."""
    ForkedJob(folder, 1, "debug_base.toml", ["--training.steps=1", "--checkpoint.interval=1", *options]).run()
    return folder / "checkpoint" / "step-1"


def _train(arguments: list[str], inside: Callable[[], None] | None) -> None:
    sys.argv = ["train", *arguments]
    from forked_rank_imports import main

    if inside is not None:
        inside()
    main()
