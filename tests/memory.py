"""What a process holds, as Linux counts it, and what operators make, exactly."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Resident:
    """Resident memory of this process: its peak since the start, above what it was then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self.start = self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM") - self.start

    def _read(self, field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


class Made(TorchDispatchMode):
    """The largest tensor that an operator made, the most bytes alive at once, and the work of products, on this rank.

    Args:
        given: What was there before, and does not count.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.largest = self.products = self.alive = self.peak = 0
        self._storages = {_local(value).untyped_storage()._cdata for value in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(_local(value))
        return result

    def _note(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or value.is_meta:
            return
        self.largest = max(self.largest, value.numel())
        self._storages.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self.alive -= size
            self._storages.discard(key)

        weakref.finalize(storage, gone)  # which lives as long as any view of it


def kept_by_selective_checkpointing(forward: Callable[[], Any]) -> list[torch.Tensor]:
    """What selective activation checkpointing keeps of one forward: this rank's parts."""
    storages: list[Any] = []
    init = torch.utils.checkpoint._CachingTorchDispatchMode.__init__

    def note(mode: Any, policy: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        storages.append(storage)
        init(mode, policy, storage, *args, **kwargs)

    with mock.patch.object(torch.utils.checkpoint._CachingTorchDispatchMode, "__init__", note):
        forward()
    entries = [entry for storage in storages for calls in storage.values() for entry in calls.values()]
    values = [getattr(wrapped, "val", None) for entry in entries for wrapped in tree_leaves(entry)]
    return [_local(value) for value in values if isinstance(value, torch.Tensor)]


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
