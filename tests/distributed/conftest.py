from pathlib import Path

import pytest
import torch
from harness import build
from hf_tiny import save_tiny_llama
from parity import ALL_ROWS, Row, train_row
from tiny_models import LLAMAS, MODELS


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The bases, and beside them the run of one rank of every job that a row that is asked for compares with."""
    folder = tmp_path_factory.mktemp("parity")
    for name, sizes in LLAMAS.items():
        save_tiny_llama(folder / name, **sizes)
    for model, options in MODELS.items():
        seed = build(folder / model, *options, "--checkpoint.initial_load_path=", "--checkpoint.create_seed_checkpoint")
        seed.trainer.checkpointer.save(curr_step=0, last_step=True)
        seed.trainer.close()
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    of_one_rank = {ALL_ROWS[name].one_rank for name in asked if name in ALL_ROWS}
    for row in of_one_rank | {Row(1).one_rank}:
        torch.save(train_row(row, folder / f"run-{row.key}", folder), folder / f"{row.key}.pt")
    return folder
