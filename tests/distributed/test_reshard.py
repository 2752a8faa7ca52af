from pathlib import Path
from typing import Any

import pytest
from launch import launch
from reshard import EXPORTED_FROM, RESUMED_ON, SAVED_ON, checks, save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    """One rank saves in this process; then one launch per number of ranks saves and resumes."""
    save(SAVED_ON["1 rank"], bases / "saved" / "1 rank", bases)
    found: dict[str, Any] = {}
    for ranks in (2, 4, 8, 1):
        folder = bases / f"reshard-{ranks}"
        folder.mkdir()
        names = [name for name in checks(bases, ranks) if name != "save on 1 rank"]
        found.update(launch("reshard.py", ranks=ranks, folder=folder, checks=names))
    return found


@pytest.mark.parametrize("saved_on", SAVED_ON)
@pytest.mark.parametrize("layout", RESUMED_ON)
def test_a_run_continues_on_another_layout(verdicts: dict[str, Any], saved_on: str, layout: str) -> None:
    verdict = verdicts[f"resume on {layout} from {saved_on}"]
    assert not verdict["error"], verdict["error"]


@pytest.mark.parametrize("layout", EXPORTED_FROM)
def test_the_peft_directory_is_the_same_file_from_every_layout(
    verdicts: dict[str, Any], layout: str, bases: Path
) -> None:
    """And the adapter that is read back from it is the one that was written, bit for bit."""
    verdict = verdicts[f"export on {layout}"]
    assert not verdict["error"], verdict["error"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        files = [bases / "exported" / which / "peft" / name for which in (layout, "1 rank")]
        assert files[0].read_bytes() == files[1].read_bytes()
