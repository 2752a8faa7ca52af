"""What is in the files before anything is tokenised: digests of their contents, and where their parts begin.

All processes together read every file once. A survey is kept under the file's path, size and time of change, as `make`
and git do, so that later runs read nothing; who changes a file and sets its time back has to remove the folder.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_converter.chat import reading
from lora_converter.chat.crew import Crew, Task, share_work
from lora_converter.chat.reading import DataFile, Part, count_lines, count_rows, parts_of
from lora_converter.files import read_json, short_digest

PARTS_PER_STRETCH = 64
"""A stretch is what one process reads at a time: 256 MiB."""


@dataclass(frozen=True)
class Surveyed:
    file: DataFile
    digest: str
    parts: list[Part]


def survey(files: list[DataFile], folder: Path, crew: Crew) -> list[Surveyed]:
    """Looks through files, each once.

    Raises:
        ValueError: A file changed meanwhile, or is a parquet file that `count_rows` refuses.
    """
    tasks = {file: _tasks(file, folder) for file in files}
    share_work([task for of_file in tasks.values() for task in of_file], crew, what="Chat data: reading the files")
    return [_surveyed(file, [read_json(task.result / "stretch.json") for task in tasks[file]]) for file in files]


def _tasks(file: DataFile, folder: Path) -> list[Task]:
    stretch = PARTS_PER_STRETCH * reading.PART_BYTES
    key = short_digest(repr((str(file.path), file.size, file.modified, stretch, reading.PART_BYTES)).encode())
    sizes = [min(stretch, file.size - start) for start in range(0, file.size, stretch)]
    return [Task(folder / f"{key}-{i}", partial(_look, file, i), size) for i, size in enumerate(sizes)]


def _look(file: DataFile, number: int, draft: Path) -> None:
    """The digest of a stretch, and how many lines begin in each of its parts."""
    parts, part_bytes = range(number * PARTS_PER_STRETCH, (number + 1) * PARTS_PER_STRETCH), reading.PART_BYTES
    sha, lines = hashlib.sha256(), []
    with open(file.path, "rb") as stream:
        stream.seek(parts[0] * part_bytes)
        for part in parts:
            if not (data := stream.read(part_bytes)):
                break
            sha.update(data)
            if not file.is_parquet:
                lines.append(count_lines(file, part))
    file.check_unchanged()
    (draft / "stretch.json").write_text(json.dumps({"sha256": sha.hexdigest(), "lines": lines}))


def _surveyed(file: DataFile, stretches: list[dict]) -> Surveyed:
    digest = short_digest(repr([file.is_parquet, file.size, [stretch["sha256"] for stretch in stretches]]).encode())
    lines = count_rows(file) if file.is_parquet else [count for stretch in stretches for count in stretch["lines"]]
    return Surveyed(file, digest, parts_of(file, lines))
