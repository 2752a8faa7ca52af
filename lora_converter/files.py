"""Files and folders that appear whole or not at all, and JSON from folders that anybody may have written.

A process that is killed while it writes leaves a draft, `<name>.incomplete`, which the next write of the same name
removes. Permissions are those of the umask.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRAFT, REPLACED = ".incomplete", ".replaced"
"""Added to a name while what will bear it is written, and to what bore it before while the two are exchanged."""

_JSON_BYTES = 2**24


@contextmanager
def appears_complete(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder`, which takes its place at the end; an error leaves `folder` as it was.

    The exchange is two renames. A process that is killed between them leaves both folders whole under their other
    names, and the next call puts the old one back first.
    """
    draft, old = (folder.with_name(folder.name + ending) for ending in (DRAFT, REPLACED))
    if old.exists() and not _there(folder):
        os.rename(old, folder)
    remove(draft)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in draft.rglob("*"):
            _sync(path)
        _exchange(draft, folder, old)
    except BaseException:
        remove(draft)
        raise
    remove(old)


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes or replaces a file: who reads it meanwhile sees the old one or the new one, never a part.

    One process at a time may write a path.
    """
    path = Path(path)
    draft = path.with_name(path.name + DRAFT)
    remove(draft)
    try:
        draft.write_bytes(data)
        _sync(draft)
        os.replace(draft, path)
    except BaseException:
        remove(draft)
        raise


def remove(path: Path) -> None:
    """Removes a file, a folder or a link, not what it points to; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, larger than 16 MiB, no JSON, or JSON of something else than an object.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > _JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; a file of settings has at most {_JSON_BYTES}.")
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as JSON ({e}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return value


def digest(*paths: Path) -> str:
    """SHA-256 of files one after the other, 12 hexadecimal digits."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**24):
                sha.update(block)
    return sha.hexdigest()[:12]


def short_digest(data: bytes) -> str:
    """`digest` of a file that has been read."""
    return hashlib.sha256(data).hexdigest()[:12]


def check_regular(path: Path) -> None:
    """A link in a downloaded folder may point to a device or a pipe, which would be read for ever.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, and no link to one.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file. Put the file itself there.")


def _exchange(draft: Path, folder: Path, old: Path) -> None:
    """`draft` becomes `folder`, and what was there `old`."""
    remove(old)
    replaces = _there(folder)
    if replaces:
        os.rename(folder, old)
    try:
        os.rename(draft, folder)
    except BaseException:
        if replaces:
            os.rename(old, folder)
        raise


def _there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _sync(path: Path) -> None:
    """To the disk, so that a machine that goes down after a rename does not leave an empty file under the new name."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
