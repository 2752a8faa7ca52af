"""Conversations as tokens on disk, made once, by all processes together.

    <folder>/surveys/     digests of the data files (`survey.py`)
    <folder>/hub/         data sets that were fetched (`hub.py`)
    <folder>/<data>-<template>-<settings>/
        parts/            while it is built (`parts.py`)
        whole/            all parts one after the other: `tokens`, the columns of `parts.py`, `starts`, `summary.json`

The name is made of digests, so that other data, another template or other settings are another cache, and the same
data elsewhere is the same one. Nothing in it depends on how many processes built it. Old caches are never removed.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_converter.chat.crew import Crew, Task, share_work
from lora_converter.chat.dataset import Dataset, open_dataset, split_dataset
from lora_converter.chat.hub import fetched
from lora_converter.chat.parts import COLUMNS, SHOWN, Encoder, Limit, Report, make_part
from lora_converter.chat.reading import find_files, sources
from lora_converter.chat.survey import Surveyed, survey
from lora_converter.files import read_json, short_digest

FORMAT = 1
"""Of the folder; another number is another cache."""


@dataclass(frozen=True)
class Cache:
    folder: Path
    fingerprint: dict[str, Any]
    """`data`, `template`, `seq_len`, `too_long`: what a run that goes on has to find again."""
    labels: list[str]
    """Of the files in the cache."""
    order: list[int]
    """The files as the data path names them, by their places in `labels`; one named twice is there twice."""

    def dataset(self) -> Dataset:
        return open_dataset(self.folder, self.fingerprint, self.labels, self.order)

    def split(self, fraction: float) -> tuple[Dataset, Dataset]:
        """Training and validation data; about `fraction` of the conversations are in the second.

        The side depends on what a record says alone: it keeps it when others are added, moved or removed, and when the
        fraction grows, those in validation stay there.

        Raises:
            ValueError: The fraction is not between 0 and 1, or one side is empty.
        """
        return split_dataset(self.dataset(), fraction)


def build(dataset_path: str, encoder: Encoder, *, folder: Path, limit: Limit, crew: Crew | None = None) -> Cache:
    """Returns when the cache is complete: all processes of the crew call it with the same arguments.

    Args:
        dataset_path: Files, folders, globs, `hub:` names; see `reading.py`.
        folder: Where caches are; all processes see it.

    Raises:
        ValueError: The path names nothing, some records cannot be used, or no example is left. The message is the
            same on all processes, and comes when everything has been looked through.
    """
    crew = crew or Crew()
    files = find_files(fetched(sources(dataset_path), folder / "hub", crew))
    distinct = list(dict.fromkeys(files))
    surveyed = survey(distinct, folder / "surveys", crew)
    digests = {found.file: found.digest for found in surveyed}
    settings = {"seq_len": limit.seq_len, "too_long": limit.too_long}
    fingerprint = {
        "data": _digest([digests[file] for file in files]),
        "template": short_digest(encoder.fingerprint().encode()),
        **settings,
    }
    name = f"{_digest(list(digests.values()))}-{fingerprint['template']}-{_digest([FORMAT, settings])}"
    _complete(folder / name, surveyed, encoder, limit, crew)
    cache = Cache(
        folder / name / "whole",
        fingerprint,
        [file.label for file in distinct],
        [distinct.index(file) for file in files],
    )
    _check(cache, limit)
    return cache


def _complete(home: Path, surveyed: list[Surveyed], encoder: Encoder, limit: Limit, crew: Crew) -> None:
    whole, parts = home / "whole", [part for found in surveyed for part in found.parts]
    tasks = [
        Task(home / "parts" / str(i), partial(make_part, part, encoder, limit), part.size)
        for i, part in enumerate(parts)
    ]
    per_file = [len(found.parts) for found in surveyed]
    share_work(tasks, crew, what="Chat data: making tokens", until=whole)
    made = [task.result for task in tasks]
    share_work([Task(whole, partial(_assemble, made, per_file))], crew, what="Chat data: putting parts together")
    if crew.rank == 0:  # another job that builds the same may be about it too
        for path in home.iterdir():
            if path != whole:
                shutil.rmtree(path, ignore_errors=True)


def _assemble(parts: list[Path], per_file: list[int], draft: Path) -> None:
    """Fills `whole`. If there are bad records, with what is wrong and nothing else."""
    reports = [Report(**read_json(part / "report.json")) for part in parts]
    ends = np.cumsum(per_file).tolist()
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    bad = [(file, *entry) for file, (a, b) in enumerate(ranges) for report in reports[a:b] for entry in report.bad]
    summary = {"files": [_sum(reports[a:b], parts[a:b]) for a, b in ranges], "bad": bad[:SHOWN]}
    if not bad:
        _join(parts, draft)
        lengths = np.fromfile(draft / "lengths", COLUMNS["lengths"])
        starts = np.zeros(len(lengths) + 1, "<i8")
        np.cumsum(lengths + 1, out=starts[1:])
        starts.tofile(draft / "starts")
    (draft / "summary.json").write_text(json.dumps(summary))


def _join(parts: list[Path], draft: Path) -> None:
    """Puts the arrays of parts one after the other."""
    with open(draft / "tokens", "wb") as out:
        for part in parts:
            with open(part / "tokens", "rb") as file:
                shutil.copyfileobj(file, out, 2**24)
    with ExitStack() as stack:
        outs = [stack.enter_context(open(draft / name, "wb")) for name in COLUMNS]
        for part in parts:
            for values, out in zip(np.fromfile(part / "columns", "<u4").reshape(len(COLUMNS), -1), outs, strict=True):
                out.write(values.tobytes())


def _sum(reports: list[Report], parts: list[Path]) -> dict[str, int]:
    """What a file has, over its parts."""
    counted = ("records", "conversations", "too_long", "truncated", "nothing_left", "bad_records")
    total = {name: sum(getattr(report, name) for report in reports) for name in counted}
    total["shortest_dropped"] = min((r.shortest_dropped for r in reports if r.shortest_dropped), default=0)
    total["examples"] = sum((part / "columns").stat().st_size for part in parts) // (4 * len(COLUMNS))
    return total


def _check(cache: Cache, limit: Limit) -> None:
    summary = read_json(cache.folder / "summary.json")
    files, bad = summary["files"], summary["bad"]
    records, refused = (sum(file[name] for file in files) for name in ("records", "bad_records"))
    if bad:
        shown = "; ".join(f"{cache.labels[file]}:{line}: {why}" for file, line, why in bad)
        more = f"; and {refused - len(bad):,} more" if refused > len(bad) else ""
        raise ValueError(f"{refused:,} of {records:,} records cannot be used: {shown}{more}. Correct or remove them.")
    for label, file in zip(cache.labels, files, strict=True):
        if not file["records"]:
            raise ValueError(f"{label} has no record, only blank lines.")
    if not any(file["examples"] for file in files):
        raise ValueError(_nothing_left(files, records, limit))


def _nothing_left(files: list[dict[str, int]], records: int, limit: Limit) -> str:
    too_long, cut = (sum(file[name] for file in files) for name in ("too_long", "nothing_left"))
    shortest = min((file["shortest_dropped"] for file in files if file["shortest_dropped"]), default=0)
    why = [
        f"{too_long:,} are too long for {limit.setting} {limit.seq_len} (the shortest has {shortest:,} tokens)"
        if too_long
        else "",
        f"{cut:,} have no trained token in their first {limit.seq_len + 1:,}" if cut else "",
    ]
    return f"No example is left of {records:,} conversations: {', '.join(filter(None, why))}. Raise {limit.setting}."


def _digest(value: Any) -> str:
    return short_digest(json.dumps(value, sort_keys=True).encode())
