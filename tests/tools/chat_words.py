"""A stand-in for the encoder of conversations, and data for it: words are tokens, words with "!" are trained."""

import json
import multiprocessing
import os
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_converter.chat.cache import Cache, build
from lora_converter.chat.crew import Crew
from lora_converter.chat.dataset import Dataset
from lora_converter.chat.parts import Limit


class Words:
    """A record's `messages` is a text, one example, or a list of texts, one example each."""

    def __init__(self, template: str = "words") -> None:
        self.template, self.encoded = template, 0

    def encode(self, record: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        self.encoded += 1
        texts = record.get("messages")
        if texts is None:
            raise ValueError("message 0 (user): content is null, not text")
        texts = texts if isinstance(texts, list) else [texts]
        return [(ids_of(text), np.array([word.endswith("!") for word in text.split()], bool)) for text in texts]

    def fingerprint(self) -> str:
        return self.template


class Untouchable(Words):
    def encode(self, record: dict) -> list:
        raise AssertionError("it is there already")


def ids_of(text: str) -> np.ndarray:
    return np.array([zlib.crc32(word.encode()) & 0xFFFF for word in text.split()], np.uint32)


def said(i: int, words: int = 0) -> str:
    """A text of 4 to 13 words that is no other's; every third word is trained."""
    return " ".join(f"w{i}.{j}{'!' * (j % 3 == 2)}" for j in range(words or 4 + i * 7 % 10))


def conversations(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"messages": said(i)} for i in range(start, start + n)]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def built(data: Any, folder: Path, *, seq_len: int = 64, too_long: Any = "drop", **more: Any) -> Cache:
    more = {"encoder": Words(), "crew": Crew(), **more}
    return build(str(data), more["encoder"], folder=folder, limit=Limit(seq_len, too_long), crew=more["crew"])


def texts(dataset: Dataset) -> list[list[int]]:
    return [dataset.example(i)[0].tolist() for i in range(len(dataset))]


def expected(*numbers: int) -> list[list[int]]:
    return [ids_of(said(i)).tolist() for i in numbers]


def contents(cache: Cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def in_processes(work: Callable[[int], None], world: int) -> list[int | None]:
    """Runs `work(rank)` in forked processes; their exit codes."""

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException:
            print(f"rank {rank}:", traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)

    children = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]
