from pathlib import Path

import pytest
import torch
from harness import build
from hf_models import save_tiny_llama
from parity import ALL_ROWS, MODELS, train_row


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, and beside them the run of one rank of every job that a row compares with."""
    folder = tmp_path_factory.mktemp("parity")
    save_tiny_llama(folder / "llama3")
    for model, options in MODELS.items():
        seed = build(folder / model, *options, "--checkpoint.initial_load_path=", "--checkpoint.create_seed_checkpoint")
        seed.trainer.checkpointer.save(curr_step=0, last_step=True)
        seed.trainer.close()
    for row in {row.one_rank for row in ALL_ROWS.values()}:
        torch.save(train_row(row, folder / f"run-{row.key}", folder), folder / f"{row.key}.pt")
    return folder
