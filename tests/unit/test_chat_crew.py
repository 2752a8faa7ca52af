"""A cache is the same whoever builds it, however many, and however often they are killed."""

import json
import logging
import multiprocessing
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from chat_words import Untouchable, Words, built, contents, in_processes

from lora_converter.chat import crew as crews
from lora_converter.chat.crew import Crew
from lora_converter.processes import Process

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_builds_the_same_bytes(world: int, data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    codes = in_processes(lambda rank: built(data, tmp_path / "cache", crew=Crew(rank, world)) and None, world)
    assert codes == [0] * world
    made = built(data, tmp_path / "cache", encoder=Untouchable())
    assert contents(made) == reference
    assert os.listdir(made.folder.parent) == ["whole"]


def test_slow_tokenising_on_rank_0_all_ranks_share_the_work(data: Path, tmp_path: Path) -> None:
    all_at_it = multiprocessing.get_context("fork").Barrier(3)

    class Together(Words):
        def encode(self, record: dict) -> list:
            if not self.encoded:
                all_at_it.wait(30)  # each has a part of its own now
            return super().encode(record)

    def work(rank: int) -> None:
        encoder = Together()
        built(data, tmp_path / "cache", encoder=encoder, crew=Crew(rank, 3))
        (tmp_path / f"{rank}").write_text(str(encoder.encoded))

    assert in_processes(work, 3) == [0, 0, 0]
    assert sum(int((tmp_path / f"{rank}").read_text()) for rank in range(3)) == 95, "a part was made twice"


def test_one_of_three_ranks_that_never_comes_is_not_waited_for(data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    assert contents(built(data, tmp_path / "cache", crew=Crew(1, 3))) == reference


class Slow(Words):
    def encode(self, record: dict) -> list:
        time.sleep(0.003)
        return super().encode(record)


def dies_at(call: int) -> Callable:
    """A function that kills the process at its n-th call, and does nothing before."""
    calls = []

    def count(*_: object, **__: object) -> None:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


MOMENTS = {
    **{f"encode {n}": ("chat_words.Words.encode", n) for n in (1, 40, 95)},
    **{f"rename {n}": ("os.rename", n) for n in (1, 4, 5, 6, 20)},
    "writing a report": ("pathlib.Path.write_text", 5),
    **{f"copying {n}": ("shutil.copyfileobj", n) for n in (1, 8)},
    "starts": ("numpy.cumsum", 2),
    "tidying up": ("shutil.rmtree", 1),
}
QUICK = ("encode 1", "encode 95", "rename 20", "copying 8", "tidying up")


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in MOMENTS])
def test_a_build_that_is_killed_goes_on_to_the_same_bytes(moment: str, data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    name, call = MOMENTS[moment]
    original, count = pkgutil.resolve_name(name), dies_at(call)

    def killing(*args: object, **kwargs: object) -> object:
        count()
        return original(*args, **kwargs)

    def work(_: int) -> None:
        with mock.patch(name, killing):
            built(data, tmp_path / "cache")

    assert in_processes(work, 1) == [-signal.SIGKILL]
    encoder = Words()
    began = time.monotonic()
    made = built(data, tmp_path / "cache", encoder=encoder)
    assert time.monotonic() - began < crews.PATIENCE / 2, "the claim of a dead process was waited for"
    assert contents(made) == reference and os.listdir(made.folder.parent) == ["whole"]
    if moment == "encode 95":
        assert encoder.encoded < 20, "finished parts were made again"


def test_two_builders_race_for_everything_and_neither_is_harmed(data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))

    def work(_: int) -> None:
        with mock.patch.object(crews._Claims, "take", lambda *_: True):  # as if no claim were ever seen
            for i in range(5):
                built(data, tmp_path / f"cache{i}")

    assert in_processes(work, 3) == [0, 0, 0]
    for i in range(5):
        assert contents(built(data, tmp_path / f"cache{i}", encoder=Untouchable())) == reference


ELSEWHERE = json.dumps({"number": 1, "place": "another boot pid:[1]", "started": "1"})


@pytest.mark.parametrize("owner", [ELSEWHERE, json.dumps(asdict(Process.here())), ""], ids=["far", "near", "not yet"])
def test_a_claim_that_is_renewed_is_respected_and_one_that_is_not_is_void(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "PATIENCE", 0.3)
    task = crews.Task(tmp_path / "x", lambda draft: None)
    claim = tmp_path / "x.claim"
    claim.write_text(owner)
    began = time.monotonic()

    def sleep_and_renew(_: float, sleep: Callable = time.sleep) -> None:
        sleep(0.01)
        if time.monotonic() - began < 0.6:
            os.utime(claim)

    monkeypatch.setattr(crews.time, "sleep", sleep_and_renew)
    crews.share_work([task], Crew(), what="x")
    assert 0.85 < time.monotonic() - began < 20
    assert sorted(os.listdir(tmp_path)) == ["x"]


def test_the_work_is_logged_with_rate_and_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "LOG_EVERY", 0.05)
    with caplog.at_level(logging.INFO, logger="lora_converter"):
        built(data, tmp_path / "one", encoder=Slow(), crew=Crew(1, 2))
        assert not caplog.messages, "rank 0 speaks for all"
        built(data, tmp_path / "two", encoder=Slow())
    lines = [line for line in caplog.messages if "making tokens" in line]
    assert len(lines) >= 3
    assert all(" parts, 0 of 0 MB, " in line for line in lines) and lines[-1].endswith(" s left.")
