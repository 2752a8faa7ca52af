"""Bytes of fake tensors that are alive, by what they are for: what a step would take on a device, without the device.

Fake tensors have shapes, dtypes and storages, and no memory. Who makes them says what they are for, by the phase that
the work is in; storages that FSDP2 empties and fills again are its gathered weights, whatever the phase.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_converter.tensors import local_part

COMMUNICATION = "communication"
"""What collectives fill, and weights that FSDP2 gathers."""

_COLLECTIVES = ("_c10d_functional", "c10d", "fsdp")


class LiveBytes(TorchDispatchMode):
    """Counts fake storages from where they are made until they are gone. Enter it after the FakeTensorMode.

    Attributes:
        phase: What new storages are for.
        live: Kind -> bytes alive.
        peak: `live` when its sum was largest, since the last `restart`.
        most: Kind -> the most bytes of it at a time, since then.
    """

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.live: Counter[str] = Counter()
        self.restart()
        self._storages: dict[int, _Storage] = {}

    def restart(self) -> None:
        """Forgets the peaks."""
        self.peak, self.most = Counter(self.live), Counter(self.live)
        self._total = self._most_total = sum(self.live.values())

    def label(self, tensors: Iterable[torch.Tensor], kind: str) -> int:
        """Says what storages are for.

        Returns:
            Their bytes, each storage counted once, and each labelled one only here.
        """
        storages = {s._cdata: s for s in (local_part(tensor).untyped_storage() for tensor in tensors)}
        for key, storage in storages.items():
            self._note(storage)
            self._move(self._storages[key], kind)
        return sum(storage.nbytes() for storage in storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # its own operators come by later
        result = func(*args, **(kwargs or {}))
        if func.namespace in _COLLECTIVES:
            self._note_buffers(tree_leaves((result, args, kwargs)))
        elif isinstance(result, FakeTensor):  # nearly always
            self._note(result.untyped_storage())
        else:
            for value in tree_leaves(result):
                if isinstance(value, FakeTensor):
                    self._note(value.untyped_storage())
        return result

    def _note_buffers(self, values: list[Any]) -> None:
        """What a collective makes or is handed to fill is a buffer, unless it is there for something else."""
        for value in values:
            if isinstance(value, FakeTensor):
                self._note(value.untyped_storage())
                found = self._storages[value.untyped_storage()._cdata]
                if found.kind == self.phase:
                    self._move(found, COMMUNICATION)

    def __enter__(self) -> Any:
        self._resizing = _told_of_resizing(self._resized)
        self._resizing.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.__exit__(*error)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        gone = weakref.ref(storage, lambda _: self._move(self._storages.pop(key), ""))
        self._storages[key] = found = _Storage(gone)
        found.size = storage.nbytes()
        self._move(found, self.phase)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if (found := self._storages.get(storage._cdata)) is not None:
            self._move(found, "")
            found.size = storage.nbytes()
            self._move(found, COMMUNICATION)

    def _move(self, storage: "_Storage", kind: str) -> None:
        """Books a storage under another kind; under none, it is gone."""
        if storage.kind:
            self.live[storage.kind] -= storage.size
            self._total -= storage.size
        storage.kind = kind
        if not kind:
            return
        self.live[kind] += storage.size
        self._total += storage.size
        self.most[kind] = max(self.most[kind], self.live[kind])
        if self._total > self._most_total:
            self._most_total, self.peak = self._total, Counter(self.live)


class _Storage:
    __slots__ = ("alive", "kind", "size")

    def __init__(self, alive: Any) -> None:
        self.alive, self.kind, self.size = alive, "", 0


@contextmanager
def _told_of_resizing(tell: Any) -> Iterator[None]:
    """FSDP2 empties and fills the storages of gathered weights without an operator."""
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(self: torch.UntypedStorage, size: int) -> Any:
        result = resize(self, size)
        tell(self)
        return result

    setattr(torch.UntypedStorage, "resize_", resize_and_tell)  # noqa: B010  a method, to the type checker
    try:
        yield
    finally:
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
