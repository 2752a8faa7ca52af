from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hf_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights as a Hugging Face folder."""
    from hf_tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("bases") / "hf")


@pytest.fixture(scope="session")
def dcp_base(hf_base: Path) -> Path:
    """The same weights as a DCP folder, beside it, written by torchtitan 0.3's own checkpointer."""
    from jobs03 import host_config, train

    folder = hf_base.parent / "made"
    train(
        host_config(
            folder,
            training__steps=1,
            lr=0.0,
            checkpoint__initial_load_path=str(hf_base),
            checkpoint__initial_load_in_hf=True,
            checkpoint__last_save_model_only=True,
        )
    )
    (folder / "checkpoint" / "step-1").rename(hf_base.parent / "dcp")
    return hf_base.parent / "dcp"


@pytest.fixture(scope="session")
def bases(dcp_base: Path) -> Path:
    """The folder of the bases, and of the runs of one rank."""
    from jobs03 import BACKENDS
    from launch import launch

    folder = dcp_base.parent
    (folder / "one").mkdir()
    found = launch("../titan03/parity03.py", ranks=1, folder=folder / "one", checks=BACKENDS)
    assert not any(verdict["error"] for verdict in found.values()), found
    return folder
