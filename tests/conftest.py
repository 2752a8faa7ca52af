import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before any import of torch: children of the test process inherit these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks, up to 8 of them, whatever the machine has
DATASETS = tempfile.TemporaryDirectory(prefix="lora-converter-datasets-")
os.environ.setdefault("HF_DATASETS_CACHE", DATASETS.name)

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    str(HERE / "titan03"),
    str(HERE / "distributed"),
    str(HERE / "tools"),
    str(HERE.parent / "scripts"),
]

import pytest  # noqa: E402

HAS_02 = version("torchtitan").startswith("0.2.")
ON_BOTH = {
    f"test_{name}.py"
    for name in (
        *("linear", "ops", "offset", "frozen_head", "qat", "packed", "packed_ops", "packed_linear"),
        *("second_kind", "plain_host", "live_bytes", "dcp_reader", "peft_directory"),
    )
}
"""Of `unit`: what leans on torch and on no torchtitan, to be tried on the torch of either."""

collect_ignore = ["titan03"]
if not HAS_02:
    others = [str(path) for path in HERE.glob("unit/test_*.py") if path.name not in ON_BOTH]
    collect_ignore = ["distributed", "integration", "numerics", *others]
"""Tests of the host that is not installed."""


@pytest.fixture(scope="session")
def hf_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights as a Hugging Face folder."""
    from hf_tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("hf_base"))


@pytest.fixture(scope="session")
def dcp_base(hf_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a DCP folder, written by torchtitan's own checkpointer."""
    from harness import BASE_CONFIG, train

    folder = tmp_path_factory.mktemp("dcp_base")
    train(
        folder,
        "--training.steps=1",
        "--optimizer.lr=0",
        f"--checkpoint.initial_load_path={hf_base}",
        "--checkpoint.initial_load_in_hf",
        config=BASE_CONFIG,
    )
    return folder / "checkpoint" / "step-1"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small job on conversations."""
    from chat_job import chat_options

    folder = tmp_path_factory.mktemp("chat") / "data"
    chat_options(folder)
    return folder
