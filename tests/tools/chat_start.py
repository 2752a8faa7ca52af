"""What a job on 1,000,000 conversations whose cache is there spends on them before its first step, over its launch.

    python tests/tools/chat_start.py [--launch]

CPU seconds, in one process: the host's imports, and then the cache looked up, opened, split for validation, planned as
rows of 4,096 tokens, described, and the first batch made. --launch adds those of a whole launch of the debug model,
`python -m lora_converter.train` on one rank for one step.
"""

import time

_START = time.process_time()

from lora_converter.titan import install  # noqa: E402

install()  # before torchtitan

import torchtitan.train  # noqa: E402, F401

import lora_converter.titan.converter  # noqa: E402, F401

IMPORTS = time.process_time() - _START

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from chat_words import Words, conversations, write_lines  # noqa: E402

from lora_converter.chat.cache import Cache, build  # noqa: E402
from lora_converter.chat.crew import Crew  # noqa: E402
from lora_converter.chat.order import TrainingOrder  # noqa: E402
from lora_converter.chat.parts import COLUMNS, Limit  # noqa: E402
from lora_converter.chat.rows import Rows  # noqa: E402

COUNT, SEQ_LEN = 1_000_000, 4096
ROOT = Path(__file__).parents[2]


def found(folder: Path) -> Cache:
    return build(str(folder / "train.jsonl"), Words(), folder=folder / "cache", limit=Limit(SEQ_LEN))


def make_large(folder: Path) -> None:
    """A cache of three conversations becomes one of a million; its tokens are a file with holes."""
    write_lines(folder / "train.jsonl", conversations(3))
    whole, rng = found(folder).folder, np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.0, 0.9, COUNT), 8, SEQ_LEN).astype("<i4")
    columns = {"lengths": lengths, "trained": lengths // 5, "keys": rng.integers(0, 2**32, COUNT)}
    for name, values in {**columns, "lines": np.arange(1, COUNT + 1)}.items():
        values.astype(COLUMNS[name]).tofile(whole / name)
    starts = np.concatenate([[0], np.cumsum(lengths + 1, dtype="<i8")])
    starts.tofile(whole / "starts")
    os.truncate(whole / "tokens", 4 * int(starts[-1]))
    summary = json.loads((whole / "summary.json").read_text())
    summary["files"][0] |= {"records": COUNT, "conversations": COUNT, "examples": COUNT}
    (whole / "summary.json").write_text(json.dumps(summary))


def start(folder: Path) -> str:
    """What a job does with its conversations until the first step; what it says of them."""
    train, validation = found(folder).split(0.01)
    rows, _ = Rows(train, seq_len=SEQ_LEN), Rows(validation, seq_len=SEQ_LEN)
    next(TrainingOrder(rows, local_batch=1, crew=Crew()))
    return f"{rows.dataset.counts.describe()}; {rows.per_epoch:,} rows"


def launch(folder: Path) -> float:
    """CPU seconds of a launch of the debug model, on one rank for one step."""
    assets = [f"--model.hf_assets_path={ROOT}/tests/assets/tokenizer", "--checkpoint.initial_load_path="]
    data = [f"--training.dataset_path={ROOT}/tests/assets/c4_test", f"--job.dump_folder={folder}/run"]
    command = [sys.executable, "-m", "lora_converter.train", "--job.config_file", f"{ROOT}/configs/debug_lora.toml"]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **rank)
    subprocess.run([*command, *assets, *data, "--training.steps=1"], env=env, check=True, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launch", action="store_true", help="launches the debug model, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_large(folder)
        began = time.process_time()
        described = start(folder)
        figures = {"imports": IMPORTS, "start": time.process_time() - began}
        if options.launch:
            figures["launch"] = launch(folder)
    figures["start / imports"] = figures["start"] / figures["imports"]
    if options.launch:
        figures["start / launch"] = figures["start"] / figures["launch"]
    print(described, file=sys.stderr)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
