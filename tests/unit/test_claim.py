"""One writer of a folder: who is refused, who takes over, and what is left behind."""

import json
import logging
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora_converter.run import claim
from lora_converter.run.claim import WRITER, Claim, Holder

_SPAWN = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.05)
    monkeypatch.setattr(claim, "PATIENCE", 0.4)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Claim]:
    ours = Claim(tmp_path / "run")
    ours.hold()
    yield ours
    ours.release()


def folder_of(held: Claim) -> Path:
    return held.path.parent / "run"


def written(held: Claim, **changes: object) -> Holder:
    """Somebody else's claim in place of ours."""
    holder = replace(Holder.here(), token="theirs", **changes)
    held.path.write_text(json.dumps(asdict(holder)))
    return holder


def in_a_process(target: object, *args: object) -> None:
    process = _SPAWN.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def _refused(folder: Path, expected: str) -> None:
    with pytest.raises(ValueError, match="is written to by another run: ") as error:
        Claim(folder).hold()
    assert expected in str(error.value) and f"If it is not running any more, delete {folder}{WRITER}." in str(
        error.value
    )


def test_a_second_process_is_refused_with_who_holds_the_folder(held: Claim) -> None:
    holder = json.loads(held.path.read_text())
    in_a_process(_refused, folder_of(held), f"process {os.getpid()} on {holder['host']}, since {holder['since']}. ")
    held.hold()  # still ours


def test_a_second_run_of_this_process_is_told_to_close_the_first(held: Claim) -> None:
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* \(this one: close its trainer\), since "):
        Claim(folder_of(held)).hold()
    held.release()
    Claim(folder_of(held)).hold()


def _holds_and_dies(folder: Path) -> None:
    Claim(folder).hold()
    os._exit(0)  # as by SIGKILL: nothing is released


def test_a_dead_holder_on_this_machine_is_taken_over_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_a_process(_holds_and_dies, tmp_path / "run")
    ours = Claim(tmp_path / "run")
    caplog.set_level("INFO")
    ours.hold()
    assert "watching for" not in caplog.text
    assert "which is gone; this run takes it over." in caplog.text
    ours.release()
    assert not tmp_path.exists()  # nothing is left


def test_a_process_that_is_dead_and_not_buried_is_dead(tmp_path: Path) -> None:
    process = _SPAWN.Process(target=_holds_and_dies, args=(tmp_path / "run",))
    process.start()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    Claim(tmp_path / "run").hold()
    process.join()


@pytest.mark.parametrize("place", ["", "another boot pid:[1]"])
def test_a_holder_elsewhere_that_counts_is_alive_and_one_that_does_not_is_dead(
    place: str, held: Claim, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = folder_of(held)
    holder = written(held, place=place, host="elsewhere")
    stop = threading.Event()

    def count() -> None:
        n = 0
        while not stop.wait(0.05):
            n += 1
            draft = held.path.with_name("draft")
            draft.write_text(json.dumps(asdict(replace(holder, count=n))))
            os.replace(draft, held.path)

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(ValueError, match=r"is written to by another run: process \d+ on elsewhere"):
        Claim(folder).hold()
    assert "which is gone" not in caplog.text
    stop.set()
    thread.join()
    ours = Claim(folder)
    ours.hold()
    assert f"is held by {holder}; watching for 0.4 s whether it lives." in caplog.text
    assert f"was held by {holder}, which is gone; this run takes it over." in caplog.text
    ours.release()


def test_a_claim_that_is_given_back_while_it_is_watched_is_free(held: Claim) -> None:
    written(held, place="", host="elsewhere")
    threading.Timer(0.1, held.path.unlink).start()
    ours = Claim(folder_of(held))
    ours.hold()
    ours.release()


def test_of_two_that_wait_for_one_that_leaves_the_quicker_has_the_folder(
    held: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(held, place="", host="elsewhere")
    slow, quick = Claim(folder_of(held)), Claim(folder_of(held))
    look = claim._read
    first = [look(held.path)]
    monkeypatch.setattr(claim, "_read", lambda path: first.pop() if first else gone_once(path))
    seen = iter([True])

    def gone_once(path: Path) -> Any:
        if next(seen, False):
            held.path.unlink()
            quick.hold()
            return None
        return look(path)

    with pytest.raises(ValueError, match="is written to by another run"):
        slow.hold()
    quick.hold()  # still its own
    quick.release()


def test_a_claim_that_is_released_while_it_is_counted_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.01)
    about_to_write, replace_file = threading.Event(), os.replace

    def slowly(*args: Any) -> None:
        about_to_write.set()
        time.sleep(0.3)
        replace_file(*args)

    ours = Claim(tmp_path / "run")
    ours.hold()
    monkeypatch.setattr(claim.os, "replace", slowly)
    assert about_to_write.wait(5)
    ours.release()
    time.sleep(0.5)
    assert not ours.path.exists()


def test_who_has_lost_the_folder_writes_to_it_no_more(held: Claim) -> None:
    other = written(held, host="elsewhere")
    time.sleep(0.2)  # the old holder's counting stops
    assert json.loads(held.path.read_text())["token"] == "theirs"
    with pytest.raises(ValueError, match=re.escape(f"was taken over by {other}. This run writes to it no more")):
        held.hold()
    held.release()
    assert held.path.exists()  # it is theirs
    held.path.unlink()


def test_a_folder_whose_claim_was_deleted_is_not_written_to(held: Claim) -> None:
    held.path.unlink()
    with pytest.raises(ValueError, match=r"was taken over when .*writer\.json was removed"):
        held.hold()


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_of_many_that_come_at_once_one_has_the_folder(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links, as on mounts of object stores, and with a dead holder's claim to take over."""
    if not links:
        monkeypatch.setattr(claim.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("not supported")))
        in_a_process(_holds_and_dies, tmp_path / "run")
    start, won, lost = threading.Barrier(6), [], []

    def run() -> None:
        ours = Claim(tmp_path / "run")
        start.wait()
        try:
            ours.hold()
            won.append(ours)
        except ValueError:
            lost.append(ours)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5
    won[0].release()
    assert not tmp_path.exists()  # nothing is left


def test_who_takes_over_waits_whether_somebody_else_does(held: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the dead one, and the other writes last."""
    written(held, started="another process")
    slept = []

    def meanwhile(seconds: float) -> None:
        slept.append(seconds)
        written(held, host="elsewhere")

    monkeypatch.setattr(claim.time, "sleep", meanwhile)
    with pytest.raises(ValueError, match=r"is written to by another run: process \d+ on elsewhere"):
        Claim(folder_of(held)).hold()
    assert slept == [claim._EXCHANGE] and claim._EXCHANGE >= 0.5


def test_a_damaged_claim_says_what_to_do(held: Claim) -> None:
    held.path.write_text("")
    with pytest.raises(ValueError, match=r"writer\.json is damaged .*Delete it if no run writes to its folder\."):
        Claim(folder_of(held)).hold()
