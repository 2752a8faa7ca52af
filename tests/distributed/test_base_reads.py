"""`base_reads.py`, one launch per number of ranks."""

from pathlib import Path
from typing import Any

import pytest
from base_reads import CHECKS, MODELS
from hf_models import HF_MODELS
from launch import launch

CLAIMS = [
    pytest.param(ranks, claim, marks=[pytest.mark.slow] * (ranks > 2), id=claim)
    for ranks, claims in CHECKS.items()
    for claim in claims
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, each in several files."""
    folder = tmp_path_factory.mktemp("base_reads")
    for model in MODELS:
        HF_MODELS[model].make().save_pretrained(folder / model, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> dict[int, dict[str, Any]]:
    return {}


@pytest.mark.parametrize(("ranks", "claim"), CLAIMS)
def test_each_rank_reads_what_it_keeps(
    verdicts: dict[int, dict[str, Any]], folder: Path, ranks: int, claim: str
) -> None:
    if ranks not in verdicts:
        (folder / str(ranks)).mkdir()
        verdicts[ranks] = launch("base_reads.py", ranks=ranks, folder=folder / str(ranks), checks=list(CHECKS[ranks]))
    assert not verdicts[ranks][claim]["error"], verdicts[ranks][claim]["error"]
