"""What a plain run does to its folder and says in its log, counted: nothing between saves, and one look at the claim.

One rank; collectives are counted in `tests/distributed/collectives.py` and `trouble.py`.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Run, build, finish

_EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
_listener: list[Any] = []
sys.addaudithook(lambda event, args: _listener[0](event, args) if _listener and event in _EVENTS else None)


@contextmanager
def file_operations(folder: Path, run: Run) -> Iterator[dict[int, Counter[tuple[str, str]]]]:
    """Step -> how often what is done to which path below `folder`; numbers in file names are left out."""
    found: dict[int, Counter[tuple[str, str]]] = {}

    def note(event: str, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], str | os.PathLike) and Path(args[0]).is_relative_to(folder):
            name = re.sub(r"checkpoint\.writer\.json\..*", "a draft", f"{Path(args[0]).relative_to(folder)}")
            found.setdefault(run.trainer.step, Counter())[event, name] += 1

    _listener.append(note)
    try:
        yield found
    finally:
        _listener.clear()


def test_files_are_touched_in_saved_steps_alone_and_the_claim_is_looked_at_once(dcp_base: Path, tmp_path: Path) -> None:
    options = [f"--checkpoint.initial_load_path={dcp_base}", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=0"]
    run = build(tmp_path, *options, "--checkpoint.no-last_save_model_only", "--training.steps=5")
    with file_operations(tmp_path, run) as found:
        finish(run)
    claim, steps = "checkpoint.writer.json", "checkpoint"
    taken = {("open", "a draft"), ("os.link", "a draft"), ("os.remove", "a draft")}
    start = {*taken, ("os.mkdir", "."), ("open", f"{steps}/branch.json"), ("os.listdir", steps), ("open", claim)}
    assert taken <= found[0].keys() <= start
    assert not found.keys() & {1, 3}  # steps that are not saved
    for step in (2, 4):
        ours = Counter({key: n for key, n in found[step].items() if claim in key[1] or "branch" in key[1]})
        assert ours == {("open", claim): 1}
        assert {name for _, name in found[step] if not name.startswith(f"{steps}/step-{step}")} <= {claim, steps}


def test_a_plain_run_says_what_it_said_before(dcp_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = build(tmp_path, f"--checkpoint.initial_load_path={dcp_base}", "--checkpoint.interval=1")
    finish(run)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("LoRA")]
    assert [re.sub(r"[0-9.]+[MKB]?|/\S+", "#", line) for line in lines] == [
        "LoRA: # linears adapted (rank #, alpha #), # of # parameters train (# %)",
        "LoRA: the loss takes the frozen output head, #,# tokens at a time#",
        "LoRA: loading the base from #",
        "LoRA: base read in # s (# GB on this rank), adapters made in # s, checks # s#",
    ]
