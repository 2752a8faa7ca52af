"""A process that wrote something is told to be alive, dead, or out of sight."""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_converter import processes
from lora_converter.processes import Process

_FORK = multiprocessing.get_context("fork")


def asleep() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_this_process_is_itself_and_alive() -> None:
    me = Process.here()
    assert me == Process.here() == Process.of(os.getpid())
    assert me.number == os.getpid() and me.place and me.is_dead() is False


def test_a_child_is_alive_until_it_has_ended() -> None:
    with asleep() as child:
        found = Process.of(child.pid)
        assert found != Process.here() and found.is_dead() is False
        child.stdin.close()
        child.wait()
        assert found.is_dead() is True


def test_a_process_that_has_ended_and_is_not_buried_is_dead() -> None:
    with asleep() as child:
        found = Process.of(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # and leaves it there
        assert Path(f"/proc/{child.pid}").exists() and found.is_dead() is True


def test_a_number_that_was_given_again_is_another_process() -> None:
    first = Process.here()
    time.sleep(0.02)  # a tick is 0.01 s
    receiver, sender = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=lambda: sender.send(Process.here()))
    child.start()
    later = receiver.recv()
    child.join()
    assert later.place == first.place and later.started != first.started
    assert replace(later, number=first.number).is_dead() is True


@pytest.mark.parametrize("place", ["", "another boot pid:[1]", "no namespaces"])
def test_a_process_of_another_place_cannot_be_seen(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    me = Process.here()
    if place == "no namespaces":
        monkeypatch.setattr(processes, "_place", lambda: "")
        assert Process.here().place == ""
    else:
        me = replace(me, place=place)
    for process in (me, replace(me, started="another"), replace(me, number=2**22 + 1)):
        assert process.is_dead() is None
    assert Process.here().is_dead() is (None if place == "no namespaces" else False)


def test_a_process_that_the_machine_hides_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `hidepid`: the folder of another user's process is not there, and a signal is not allowed."""
    hidden = replace(Process.here(), number=2**22 + 1)  # more than any process has

    def kill(number: int, signal: int) -> None:
        assert (number, signal) == (hidden.number, 0)
        raise PermissionError

    assert hidden.is_dead() is True
    monkeypatch.setattr(os, "kill", kill)
    assert hidden.is_dead() is None
