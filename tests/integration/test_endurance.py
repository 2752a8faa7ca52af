"""Jobs that are killed again and again, and jobs that train long. The scripts do the same for longer."""

import random
from pathlib import Path
from statistics import median

import pytest
from forked_job import make_base
from long_run import long_run, slope
from torture import torture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (1, "async"), (2, "async")])
def test_a_job_that_is_killed_ended_and_sent_back_again_and_again_ends_where_it_would_have_ended(
    ranks: int, mode: str, base: Path, tmp_path: Path
) -> None:
    counts = torture(tmp_path, base, ranks, mode, moves=4, rng=random.Random(ranks), steps=60)
    assert counts.kills == 4 and counts.signals >= 2 and counts.rollbacks >= 2 and counts.resumes >= 6
    assert counts.lost == 0


def test_nothing_piles_up_in_a_long_run(tmp_path: Path) -> None:
    samples = long_run(tmp_path, steps=400, interval=10, flavor="torture", async_mode="async")
    assert len(samples) > 50
    # A page or two per step would be a leak of tensors or of the log's kind; the allocator takes some of this.
    assert slope(samples) < 16 * 1024
    threads = [sample.threads for sample in samples]  # one more while a save is under way, if a sample meets it
    assert median(threads[-20:]) == median(threads[:20])
    assert max(s.files for s in samples) - min(s.files for s in samples) <= 2  # while a file is written
    assert len(list((tmp_path / "run" / "checkpoint").iterdir())) == 3
