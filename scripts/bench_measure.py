"""What the parts of bench.py measure with: times taken in turn, and the bytes that torch's allocator has given out."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
Times = dict[str, list[float]]


def seconds(step: Callable[[], object], device: str, cpu_time: bool = False) -> float:
    """What one step takes: wall time, or this process's CPU time, which others on the machine hardly change."""
    clock = time.process_time if cpu_time else time.perf_counter
    wait(device)
    start = clock()
    step()
    wait(device)
    return clock() - start


def paired(steps: Mapping[str, T], rounds: int, seconds_of: Callable[[T], float]) -> Times:
    """Seconds of each step in each round; the order turns, so that no peer always follows the same one."""
    times: Times = {name: [] for name in steps}
    names = list(steps)
    for number in range(-2, rounds):  # two rounds to warm up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = seconds_of(steps[name])
            if number >= 0:
                times[name].append(taken)
    return times


def ratio(times: Times, name: str, over: str) -> float:
    """The median over the rounds of one step's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Allocated:
    """Bytes above those at the start.

    Attributes:
        peak: At most, so far.
        left: At the end; below 0 where more was freed than taken.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def allocated(device: str) -> Iterator[Allocated]:
    """Counts what torch allocates within, compiled code's buffers as well; complete at the end.

    On a CPU these are the bytes of tensors, from the profiler's record of the allocator. The resident set would add
    what compiling takes, and pages that are kept for later.
    """
    found = Allocated()
    if device == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        wait(device)
        found.peak = torch.cuda.max_memory_allocated() - before
        found.left = torch.cuda.memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        found.left += event.nbytes()
        found.peak = max(found.peak, found.left)
