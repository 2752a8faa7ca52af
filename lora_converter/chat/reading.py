"""Files of conversations: which ones a data path names, and the fixed parts in which several processes read them.

A part of a JSONL file is a range of `PART_BYTES` bytes; a line belongs to the part in which it begins. A part of a
parquet file is a row group. Parts depend on the file alone, so that any number of processes makes the same ones.

JSON lines are read by `json`, not by Arrow: Arrow gives all records the keys of all others, and refuses tool calls
whose arguments have different types.

A key with null counts as absent, at any depth and in files of any kind: Arrow gives every object the keys of all
others, with null, and so do JSON lines that were written from Arrow. What is absent must not reach a template, nor make
another record of the same one. A null is kept in what is JSON text itself, as a call's arguments and `tools` may be.
"""

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_converter.files import check_regular

PART_BYTES = 4 * 2**20

HUB = "hub:"
COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""A parquet file needs the columns of one of these."""

_LINES, _TABLE = (".jsonl", ".json"), ".parquet"
_OF_FOLDER = (".jsonl", _TABLE)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DataFile:
    path: Path
    label: str
    """How messages name it."""
    size: int
    modified: int
    """In nanoseconds."""

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == _TABLE

    def check_unchanged(self) -> None:
        """Raises ValueError if the file is not the one that was found."""
        if (now := _stat(self.path)) != (self.size, self.modified):
            raise ValueError(f"{self.path} changed while it was read ({self.size} bytes, now {now[0]}). Start again.")


@dataclass(frozen=True)
class Part:
    file: DataFile
    number: int
    first_line: int
    """Number of the first line or row that is in it, from 1."""
    size: int
    """About how many bytes it has."""


@dataclass(frozen=True)
class Broken:
    """What stands where a record should."""

    why: str


def sources(dataset_path: str) -> list[str]:
    """The items of a comma-separated list; a path whose name has a comma is one item."""
    items = [dataset_path] if os.path.exists(dataset_path) else dataset_path.split(",")
    if not (items := [item.strip() for item in items if item.strip()]):
        raise ValueError(f"{dataset_path!r} names nothing. {_allowed()}")
    return items


def find_files(items: list[str]) -> list[DataFile]:
    """The files of all items in order; one that two items name is there twice, and counts twice.

    Raises:
        ValueError: An item names nothing, a file of another kind, or an empty one.
    """
    paths = [path for item in items for path in _expand(item)]
    names: dict[str, set[Path]] = {}
    for path in paths:
        names.setdefault(path.name, set()).add(path)
    return [_data_file(path, path.name if len(names[path.name]) == 1 else str(path)) for path in paths]


def parts_of(file: DataFile, lines: list[int]) -> list[Part]:
    """Args: lines: how many lines or rows begin in each part (see `count_lines`, `count_rows`)."""
    parts, first = [], 1
    for number, count in enumerate(lines):
        parts.append(Part(file, number, first, file.size // len(lines)))
        first += count
    return parts


def count_lines(file: DataFile, number: int) -> int:
    """Lines of a JSONL file that begin in one part."""
    with open(file.path, "rb") as stream:
        stream.seek(max(number * PART_BYTES - 1, 0))
        return stream.read(PART_BYTES - (number == 0)).count(b"\n") + (number == 0)


def count_rows(file: DataFile) -> list[int]:
    """Rows of each row group of a parquet file.

    Raises:
        ValueError: It is none, has no row, or has no columns with conversations.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            rows = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    except (OSError, ValueError) as e:
        raise ValueError(f"{file.label} cannot be read as parquet ({_one_line(e)}).") from None
    if not any(set(needed) <= set(columns) for needed in COLUMNS):
        allowed = ", or ".join(" and ".join(needed) for needed in COLUMNS)
        raise ValueError(f"{file.label} has the columns {', '.join(columns)}; a conversation is in {allowed}.")
    if not sum(rows):
        raise ValueError(f"{file.label} has no row.")
    return rows


def read(part: Part) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """Line or row numbers, from 1, with the record there, or what is wrong with it.

    Blank lines are skipped. Records are without nulls.
    """
    if part.file.is_parquet:
        yield from enumerate(_rows(part), part.first_line)
        return
    start, stop = part.number * PART_BYTES, (part.number + 1) * PART_BYTES
    with open(part.file.path, "rb") as stream:
        if start:
            stream.seek(start - 1)
            start += len(stream.readline()) - 1  # the end of a line that began before
        number = part.first_line
        while start < stop and (line := stream.readline()):
            start += len(line)
            if line := line.removeprefix(_BOM).strip():
                yield number, _record(line)
            number += 1


def without_nulls(value: Any) -> Any:
    """A record without keys that have null; lists keep theirs, which have a place."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _record(line: bytes) -> dict[str, Any] | Broken:
    try:
        value = without_nulls(json.loads(line.decode()))
    except (ValueError, RecursionError) as e:
        hint = ""
        if line.startswith(b"["):
            hint = "; it looks like one list over many lines, and each line has to be one object"
        return Broken(f"is no JSON ({_one_line(e)}){hint}")
    if isinstance(value, dict):
        return value
    kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")
    return Broken(f"is {kind}; each line has to be one JSON object")


def _rows(part: Part) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.file.path) as table:
        for batch in table.iter_batches(batch_size=256, row_groups=[part.number]):
            for row in batch.to_pylist():
                yield without_nulls(row)


def _expand(item: str) -> list[Path]:
    """A file, a folder or a glob as files, in the order of their names."""
    path = Path(item).expanduser()
    if path.is_dir():
        found = sorted(
            Path(folder, name)
            for folder, inner, names in os.walk(path)
            if _drop_hidden(inner)
            for name in names
            if name.endswith(_OF_FOLDER) and not name.startswith(".")
        )
        if not found:
            raise ValueError(f"{item} is a folder with no {' or '.join(_OF_FOLDER)} file.")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(item) and (matches := sorted(glob.glob(str(path), recursive=True))):
        return [file for match in matches for file in _expand(match)]
    raise ValueError(f"{item} is no file or folder, and no glob that matches one. {_allowed()}")


def _drop_hidden(folders: list[str]) -> bool:
    """Keeps `os.walk` out of `.cache` and the like. Always true."""
    folders[:] = [name for name in folders if not name.startswith(".")]
    return True


def _data_file(path: Path, label: str) -> DataFile:
    if path.suffix not in (*_LINES, _TABLE):
        raise ValueError(f"{path} is of another kind. {_allowed()}")
    check_regular(path)
    file = DataFile(path.resolve(), label, *_stat(path))
    if file.size == 0:
        raise ValueError(f"{label} is empty.")
    # The name that was given has the ending, not what a link points to.
    return file if file.path.suffix == path.suffix else replace(file, path=path.absolute())


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _allowed() -> str:
    return (
        "Give .jsonl, .json (one object per line) or .parquet files, a folder of .jsonl and .parquet files, a glob, "
        f"{HUB}org/name[:split], or several of these with commas between them."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
