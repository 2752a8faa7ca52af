"""Data sets of the Hugging Face Hub, fetched by `datasets` when the user asks for one, and kept as JSON lines."""

import json
from functools import partial
from pathlib import Path

from lora_converter.chat.crew import Crew, Task, share_work
from lora_converter.chat.reading import HUB, without_nulls
from lora_converter.files import short_digest


def fetched(items: list[str], folder: Path, crew: Crew) -> list[str]:
    """The items, with files in the place of `hub:org/name[:split]`.

    A data set is fetched once: what is in `folder` is taken as it is, so that a run that goes on has the data with
    which it began. Remove its folder there to fetch it anew.

    Raises:
        ValueError: `datasets` cannot load one.
    """
    tasks = {item: Task(folder / _name(item), partial(_fetch, item)) for item in items if item.startswith(HUB)}
    share_work(list(tasks.values()), crew, what="Chat data: fetching data sets")
    return [str(tasks[item].result / f"{_name(item)}.jsonl") if item in tasks else item for item in items]


def _parse(item: str) -> tuple[str, str]:
    name, _, split = item.removeprefix(HUB).partition(":")
    if not name:
        raise ValueError(f"{item!r} names no data set. Write {HUB}org/name or {HUB}org/name:split.")
    return name, split or "train"


def _name(item: str) -> str:
    name, split = _parse(item)
    return f"{Path(name).name}-{''.join(c if c.isalnum() else '_' for c in split)}-{short_digest(item.encode())}"


def _fetch(item: str, draft: Path) -> None:
    from datasets import load_dataset

    name, split = _parse(item)
    try:
        rows = load_dataset(name, split=split)
    except Exception as e:
        raise ValueError(f"{item} cannot be loaded by datasets: {type(e).__name__}: {e}") from e
    # Without nulls it is far smaller where records differ in their keys.
    with open(draft / f"{_name(item)}.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(without_nulls(row), default=str) + "\n")
