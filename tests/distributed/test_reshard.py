from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from parity import train_row
from reshard import EXPORTED_FROM, PISSA_ON, RESUMED_ON, SAVED_ON, checks, resume_pissa, save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdicts(bases: Path) -> dict[str, Any]:
    """One rank saves in this process; then one launch per number of ranks saves and resumes."""
    save(SAVED_ON["1 rank"], bases / "saved" / "1 rank", bases)
    found: dict[str, Any] = {}
    for ranks in (2, 4, 8, 1):
        folder = bases / f"reshard-{ranks}"
        folder.mkdir()
        names = [name for name in checks(bases, ranks) if name != "save on 1 rank" and "PiSSA" not in name]
        found.update(launch("reshard.py", ranks=ranks, folder=folder, checks=names))
    return found


@pytest.mark.parametrize("saved_on", SAVED_ON)
@pytest.mark.parametrize("layout", RESUMED_ON)
def test_a_run_continues_on_another_layout(verdicts: dict[str, Any], saved_on: str, layout: str) -> None:
    verdict = verdicts[f"resume on {layout} from {saved_on}"]
    assert not verdict["error"], verdict["error"]


def test_what_began_at_the_base_continues_on_another_layout(bases: Path) -> None:
    one = PISSA_ON["1 rank"].one_rank
    torch.save(train_row(one, bases / "run-of-pissa", bases), bases / f"{one.key}.pt")
    (bases / "reshard-pissa").mkdir()
    names = [name for name in checks(bases, 2) if "PiSSA" in name]
    assert names == ["save PiSSA on TP2", "resume PiSSA on FSDP2", "resume PiSSA on PP2"]
    verdicts = launch("reshard.py", ranks=2, folder=bases / "reshard-pissa", checks=names)
    assert {name: verdict["error"] for name, verdict in verdicts.items()} == dict.fromkeys(names, "")
    resume_pissa(PISSA_ON["1 rank"], bases / "saved" / "PiSSA", bases)


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
