"""Reads DCP folders without running what is in them, and tells whole ones from those that were cut short.

torch reads `.metadata`, and every value that is no tensor, with plain pickle, which runs whatever code the file names.
Here `.metadata` is read by `pickles.py`, and values with torch's `weights_only`.
Sizes and file names are checked against the files before anything is allocated.
"""

import io
import math
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlanner, StorageReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _ReaderView

from lora_converter.dcp.pickles import DCP_METADATA, REFUSED, unpickle
from lora_converter.files import check_regular, short_digest

METADATA_FILE = ".metadata"
"""Written last, so a folder that has it is whole unless somebody took a file away."""

_UNPICKLED = "dataloader."
"""Values of these names are pickles that the host's data loader loads."""


class SafeReader(FileSystemReader):
    """DCP's reader of folders, for those of anybody.

    Args:
        metadata: What `read_metadata` found in the folder.
    """

    def __init__(self, path: str | Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # with DCP's arguments each rank needs a file
        """What the folder holds."""
        self._metadata.storage_meta = self._metadata.storage_meta or dcp_metadata.StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        """The bytes of a tensor or value, once they are known not to be compressed: they take what they are large."""
        found = _Slice(file, sinfo.offset, sinfo.length)
        try:
            with zipfile.ZipFile(cast(IO[bytes], found)) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as e:
            raise ValueError(f"{sinfo.relative_path} is damaged ({e}).") from None
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > sinfo.length:
            raise ValueError(f"{sinfo.relative_path} holds compressed values, which DCP does not write.")
        found.seek(0)
        return found


class _Slice(_ReaderView):
    """DCP's, whose positions from the end are wrong."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            offset, whence = self.len + offset, os.SEEK_SET
        return super().seek(offset, whence)


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, which loads values that are no tensors with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a value in its place. The host's data loader unpickles its own, so these are looked through first."""
        fqn = read_item.dest_index.fqn
        _refuse_bytearrays(value, fqn)
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as e:
            named = re.search(r"GLOBAL (\S+)", str(e))  # torch's text goes on to advise weights_only=False
            raise ValueError(REFUSED.format(what=fqn, name=named[1]) if named else f"{fqn} is damaged.") from None
        if fqn.startswith(_UNPICKLED) and isinstance(loaded, bytes):
            loaded = pickle.dumps(unpickle(loaded, fqn, {}))  # what was looked through, and no other reading of it
        set_element(self.original_state_dict, self.mappings[fqn], loaded)


def load(state_dict: dict[str, Any], path: str | Path, metadata: Metadata, *, no_dist: bool = False) -> None:
    """`dcp.load` from a folder into `state_dict`, in place. A collective, unless `no_dist` or without process group.

    Args:
        metadata: What `read_metadata` found in the folder.

    Raises:
        ValueError: What is read is damaged, or could run code.
    """
    read(state_dict, path, SafeReader(path, metadata), SafePlanner(), no_dist=no_dist)


def read(
    state_dict: dict[str, Any], path: str | Path, reader: StorageReader, planner: LoadPlanner, *, no_dist: bool = False
) -> None:
    """`load` with another reader of the folder, for those that are not DCP's.

    Raises:
        ValueError: Something cannot be read.
    """
    alone = no_dist or not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled", UserWarning
            )  # which is what was asked for
            dcp.load(state_dict, storage_reader=reader, planner=planner, no_dist=alone)
    except (CheckpointException, Exception) as e:  # the first is a BaseException
        failures = getattr(e, "failures", None)
        reasons = {str(error) for error, _ in failures.values()} if failures else {str(e) or repr(e)}
        raise ValueError(f"{path} could not be read: {'; '.join(sorted(reasons))}") from None


def read_metadata(path: str | Path) -> Metadata:
    """What a DCP folder holds.

    Raises:
        ValueError: It is no complete DCP folder, damaged, or names what could run code.
    """
    return read_folder(path)[0]


def read_folder(path: str | Path) -> tuple[Metadata, str]:
    """What a DCP folder holds, and a digest of its `.metadata`, which is read once for both.

    Raises:
        ValueError: It is no complete DCP folder, damaged, or names what could run code.
    """
    path = Path(path)
    file = path / METADATA_FILE
    try:
        check_regular(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a complete DCP checkpoint, it has no {METADATA_FILE} file.") from None
    data = file.read_bytes()
    metadata = unpickle(data, str(file), DCP_METADATA)
    try:
        _check(metadata, path)
    except (AttributeError, TypeError, OverflowError, OSError) as e:
        raise ValueError(f"{file} is damaged ({e}).") from None
    return metadata, short_digest(data)


def _check(metadata: Metadata, folder: Path) -> None:
    """That all that is listed is in the folder's files, and no larger than they are."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{folder / METADATA_FILE} holds a {type(metadata).__name__}, no DCP metadata.")
    sizes: dict[str, int] = {}
    for index, stored in metadata.storage_data.items():
        name = stored.relative_path
        if not type(name) is type(index.fqn) is str or not type(stored.offset) is type(stored.length) is int:
            raise TypeError("an entry names no place in a file")
        if name not in sizes:
            if name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"{folder / METADATA_FILE} names {name!r}, which is not in its folder.")
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not complete: {name} is missing.")
            sizes[name] = (folder / name).stat().st_size
        if min(stored.offset, stored.length) < 0 or stored.offset + stored.length > sizes[name]:
            raise ValueError(f"{folder} is not complete: {name} is cut short, {index.fqn} is not in it.")
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            parts = [(MetadataIndex(fqn), 0)]
        elif isinstance(entry, TensorStorageMetadata):
            extents = [entry.size, *(size for chunk in entry.chunks for size in (chunk.sizes, chunk.offsets))]
            if any(type(size) is not torch.Size for size in extents):
                raise TypeError("a size is not a torch.Size")
            parts = [
                (MetadataIndex(fqn, chunk.offsets), math.prod(chunk.sizes) * entry.properties.dtype.itemsize)
                for chunk in entry.chunks
            ]
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"{folder / METADATA_FILE} is damaged: the parts of {fqn} do not make it up.")
        else:
            raise ValueError(f"{folder / METADATA_FILE} is damaged: {fqn} is a {type(entry).__name__}.")
        for index, nbytes in parts:
            stored = metadata.storage_data.get(index)
            compressed = stored is not None and stored.transform_descriptors
            if stored is None or (nbytes > stored.length and not compressed):
                raise ValueError(f"{folder / METADATA_FILE} is damaged: {fqn} is not in the folder's files.")


def _refuse_bytearrays(value: io.BytesIO, fqn: str) -> None:
    """`weights_only` makes a bytearray of whatever size a value asks for."""
    with zipfile.ZipFile(value) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl") and any(
                op.name == "GLOBAL" and str(arg).endswith(" bytearray")
                for op, arg, _ in pickletools.genops(archive.read(name))
            ):
                raise ValueError(f"{fqn} holds a bytearray, which is not read.")
    value.seek(0)
