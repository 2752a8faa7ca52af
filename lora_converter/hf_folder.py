"""Hugging Face directories as files: what weights one holds, and writing one so that it appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


def weight_shapes(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Key -> (file, shape) of every tensor in the folder's safetensors files, read from their headers.

    Raises:
        ValueError: There is no such file, or one is damaged.
    """
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({key: (path, file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged or no safetensors file ({e}).") from None
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file. Name the Hugging Face directory of the base.")
    return shapes


@contextmanager
def appears_complete(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder`, which takes its place at the end; an error leaves `folder` as it was."""
    draft = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
