"""Pickles of anybody, read without running what is in them.

A pickle may name DCP's own classes and what `torch.serialization.add_safe_globals` was given, and nothing else
(https://docs.python.org/3/library/pickle.html#restricting-globals). It fills DCP's dataclasses with their own fields,
and makes nothing that is larger than what it is written in.
"""

import dataclasses
import io
import pickle
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorProperties

REFUSED = (
    "{what} names {name}, which could run code when it is read, so it is not. If you trust it, allow that with "
    "torch.serialization.add_safe_globals."
)
"""Of a pickle that names what is not allowed."""

_FIELDS = {
    cls: {field.name for field in dataclasses.fields(cls)}
    for cls in (*(getattr(dcp_metadata, name) for name in dcp_metadata.__all__), _StorageInfo)
}
"""DCP's dataclasses and what they may be filled with."""


def _no_path(*parts: Any) -> None:
    """Where the folder was when it was written, of which nothing is made."""


_MEMORY_FORMAT = dcp_metadata._MEM_FORMAT_ENCODING
_UNTIL_TORCH_2_2 = "torch.distributed._shard.sharded_tensor.metadata"
DCP_METADATA: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in (*_FIELDS, _MEMORY_FORMAT)},
    **{(module, name): _no_path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (_UNTIL_TORCH_2_2, "TensorProperties"): TensorProperties,
    (_UNTIL_TORCH_2_2, "MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
}
"""What DCP's metadata are made of. `pathlib._local` is where Python 3.13 has its paths."""

_PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # not in pickle's stubs


class _Unpickler(_PythonUnpickler):
    """Python's own, whose steps can be overridden: of a pickle only plain values and the allowed objects are made."""

    def __init__(self, data: bytes, what: str, allowed: dict[tuple[str, str], Any]):
        super().__init__(io.BytesIO(data))
        self.what = what
        self.allowed = dict(allowed)
        self.users = []
        for item in torch.serialization.get_safe_globals():
            obj, name = item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
            module, _, qualname = name.rpartition(".")
            if not module.startswith("torch."):  # torch has put DeviceMesh and the like there
                self.allowed[module, qualname] = obj
                self.users.append(obj)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise ValueError(REFUSED.format(what=self.what, name=f"{module}.{name}"))

    def load_build(self) -> None:
        """Fills a dataclass of DCP's. Anything else, a class above all, could be changed for the whole process."""
        state, instance = self.stack[-1], self.stack[-2]
        if (type(instance) is TensorProperties and type(state) is tuple) or type(instance) in self.users:
            super().load_build()
        elif type(state) is dict and state.keys() <= _FIELDS.get(type(instance), set()):
            instance.__dict__.update(self.stack.pop())
        else:
            raise TypeError(f"it changes a {type(instance).__name__}")

    def load_bytearray8(self) -> None:
        """It would be allocated before it is read, and no value of DCP's is one."""
        raise TypeError("it holds a bytearray")

    dispatch: ClassVar = {
        **_PythonUnpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def unpickle(data: bytes, what: str, allowed: dict[tuple[str, str], Any]) -> Any:
    """The value of a pickle.

    Args:
        what: What it is, for messages.
        allowed: (module, name) -> what stands for it; beside plain values, dtypes and what the user calls safe.

    Raises:
        ValueError: It is damaged, or names something else.
    """
    unpickler = _Unpickler(data, what, allowed)
    try:
        return unpickler.load()
    except ValueError as e:
        if str(e).startswith(f"{what} names "):
            raise
        raise ValueError(f"{what} is damaged ({e}).") from None
    except Exception as e:  # whatever a damaged pickle leads Python to
        raise ValueError(f"{what} is damaged ({type(e).__name__}: {e}).") from None
