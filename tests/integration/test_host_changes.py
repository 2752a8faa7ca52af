"""The changes to the host are one table: applied together, once, and undone together."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from harness import ROOT, build, install, parse, start_process_group
from torchtitan.components.checkpoint import CheckpointManager

from lora_converter.titan import installed
from lora_converter.titan.checkpoint import LoRACheckpointManager
from lora_converter.titan.cpu_changes import CPU_CHANGES
from lora_converter.titan.host_changes import CHANGES, TRAINER_CHANGES
from lora_converter.titans import cpu
from lora_converter.titans.change import Change
from lora_converter.titans.cpu_changes import BEFORE_IMPORT

MISSING = object()
MADE = (*CHANGES, *CPU_CHANGES) if cpu.is_chosen() else CHANGES


@pytest.fixture(autouse=True)
def _installed_afterwards() -> Any:
    yield
    install()


def values() -> list[Any]:
    """What every attribute that the table names is now; of dicts a copy, since what is in them counts."""
    found = [vars(owner).get(name, MISSING) for owner, name in (change.owner() for change in MADE)]
    return [dict(value) if isinstance(value, dict) else value for value in found]


def test_twice_is_once_and_undone_once_the_host_is_as_it_was() -> None:
    install().undo()
    before = values()
    first = install()
    once = values()
    assert all(a is not b and a != b for a, b in zip(before, once, strict=True))
    assert install() is first and values() == once
    first.undo()
    assert values() == before
    first.undo()
    assert values() == before


def test_the_end_of_a_with_block_undoes_it_also_after_an_error() -> None:
    install().undo()
    before = values()
    with pytest.raises(KeyError), install():
        assert values() != before
        raise KeyError
    assert values() == before


def test_a_row_that_fails_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    install().undo()
    before = values()
    broken = Change("torch:no_such_attribute", "titans.cpu:histc_of_integers", "", "")
    monkeypatch.setattr(installed, "CHANGES", (*CHANGES, broken))
    with pytest.raises(AttributeError, match="no_such_attribute"):
        install()
    assert values() == before


def test_every_row_says_why_and_until_when_and_none_stands_twice() -> None:
    rows = (*BEFORE_IMPORT, *CHANGES, *CPU_CHANGES, *TRAINER_CHANGES)
    assert all(change.reason and change.until and change.make for change in rows)
    assert len({(change.target, change.make) for change in rows}) == len(rows)


def test_a_changed_host_still_takes_integers_and_floats_for_a_histogram() -> None:
    counts = torch.histc(torch.tensor([0, 1, 1, 3]), bins=4, min=0, max=3)
    assert counts.tolist() == [1, 2, 0, 1] and counts.dtype == torch.int64
    install().undo()
    with pytest.raises(RuntimeError):
        torch.histc(torch.tensor([0, 1, 1, 3]), bins=4, min=0, max=3)


def test_the_converter_of_a_job_installs_what_was_undone(tmp_path: Any) -> None:
    config = parse(tmp_path, "--checkpoint.initial_load_path=")
    install().undo()
    assert config.lora.rank == 4
    run = build(tmp_path, "--checkpoint.initial_load_path=")
    assert type(run.trainer.checkpointer) is LoRACheckpointManager
    run.trainer.close()


def test_other_checkpointers_over_a_converted_model_are_refused(tmp_path: Any) -> None:
    class Mine(CheckpointManager):
        pass

    run = build(tmp_path, "--checkpoint.initial_load_path=")
    with pytest.raises(ValueError, match="Mine cannot checkpoint a model with adapters"):
        Mine(None, run.trainer.model_parts)
    run.trainer.close()


READING = """
import sys
from lora_converter.titans import cpu
cpu.prepare()
import torchtitan.config as config
from lora_converter import titan
from lora_converter.titan import host_changes
before = [getattr(*change.owner()) for change in host_changes.CHANGES]
titan.install, titan.LoRAConverter
import lora_converter.titan.converter, lora_converter.titan.checkpoint, lora_converter.titan.phases
after = [getattr(*change.owner()) for change in host_changes.CHANGES]
assert all(a is b for a, b in zip(before, after)), "reading installed something"
sys.argv = ["x"]
config.ConfigManager().parse_args(["--job.custom_config_module=lora_converter.titan"])
after = [getattr(*change.owner()) for change in host_changes.CHANGES]
assert not any(a is b for a, b in zip(before, after)), "building a job config did not install"
"""


def test_reading_installs_nothing_and_building_a_job_config_does() -> None:
    result = subprocess.run([sys.executable, "-c", READING], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("method", ["ALL_TO_ALL", "ALL_GATHER"])
def test_the_ring_of_context_parallelism_computes_nothing_beside_an_exchange_over_gloo(method: str) -> None:
    """Together they corrupt the heap; the crash itself takes thousands of rings (the row of `cpu_changes.py`)."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    install()
    start_process_group()
    rotater = ring._create_rotater(torch.distributed.group.WORLD, 2, ring._RotateMethod[method])
    before = torch._C._distributed_c10d._get_work_registry_size()
    rotater.exchange_buffers(torch.arange(3.0))
    assert torch._C._distributed_c10d._get_work_registry_size() == before  # nothing is in flight
    assert rotater.next_buffer().tolist() == [0.0, 1.0, 2.0]
