"""One part of the files as tokens.

A part is a folder: `tokens` (uint32, bit 31 says that the token is trained), `columns` with an entry per example
(columns, examples: see `COLUMNS`), and `report.json` with what was refused and dropped. Arrays are raw, little-endian.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lora_converter.chat.reading import Broken, Part, read
from lora_converter.chat.settings import TooLong, check_choice

TRAINED = np.uint32(1 << 31)
IDS = np.uint32((1 << 31) - 1)

COLUMNS = {"lengths": "<i4", "trained": "<i4", "keys": "<u4", "lines": "<u4"}
"""With their types, all of 4 bytes: inputs of an example (its tokens less one), labels of it that are trained, 32 bits
of its record's digest, its line."""

SHOWN = 5
"""Bad records that an error names."""


class Encoder(Protocol):
    """Makes examples of a record; each is (ids: uint32, trained: bool), as long as each other."""

    def encode(self, record: dict[str, Any]) -> Sequence[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
        """Raises ValueError for a record that cannot be used; the message says what is wrong with it."""
        ...

    def fingerprint(self) -> str:
        """Changes with everything on which the result of `encode` depends."""
        ...


@dataclass(frozen=True)
class Limit:
    """What becomes of an example whose inputs, its tokens less one, are more than `seq_len`."""

    seq_len: int
    too_long: TooLong = "drop"
    setting: str = "training.seq_len"
    """Where `seq_len` comes from, for messages."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"{self.setting} is {self.seq_len}; it is at least 1.")
        check_choice("too_long", self.too_long)


@dataclass
class Report:
    records: int = 0
    conversations: int = 0
    """Records with an example that is kept."""
    too_long: int = 0
    """Examples dropped for their length."""
    truncated: int = 0
    nothing_left: int = 0
    """Examples dropped because truncation would leave no trained token."""
    shortest_dropped: int = 0
    """Tokens of the shortest example dropped for its length."""
    bad_records: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Line and message of the first of them."""

    def refuse(self, line: int, why: str) -> None:
        self.bad_records += 1
        if len(self.bad) < SHOWN:
            self.bad.append((line, " ".join(why.split())[:500]))


def make_part(part: Part, encoder: Encoder, limit: Limit, draft: Path) -> None:
    """Fills the folder of a part."""
    report, tokens = Report(), []
    entries: list[tuple[int, int, int, int]] = []
    for line, record in read(part):
        report.records += 1
        if isinstance(record, Broken):
            report.refuse(line, record.why)
            continue
        try:
            examples = list(_examples(record, encoder, limit, report))
        except ValueError as e:
            report.refuse(line, str(e))
            continue
        except Exception as e:
            raise RuntimeError(f"{part.file.label}:{line}: {type(e).__name__}: {e}") from e
        report.conversations += bool(examples)
        key = key_of(record)
        for ids, trained in examples:
            tokens.append(ids | trained * TRAINED)
            entries.append((len(ids) - 1, int(trained[1:].sum()), key, line))
    part.file.check_unchanged()
    np.concatenate([np.zeros(0, np.uint32), *tokens]).astype("<u4", copy=False).tofile(draft / "tokens")
    np.asarray(entries, "<u4").reshape(-1, len(COLUMNS)).T.tofile(draft / "columns")
    (draft / "report.json").write_text(json.dumps(vars(report)))


def key_of(record: dict[str, Any]) -> int:
    """32 bits that depend on what the record says, not on where it is or how its JSON is written."""
    canonical = json.dumps(record, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=4).digest(), "little")


def _examples(
    record: dict[str, Any], encoder: Encoder, limit: Limit, report: Report
) -> Iterator[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
    """The examples of a record that are kept."""
    encoded, room = encoder.encode(record), limit.seq_len + 1
    if not any(trained[1:].any() for _, trained in encoded):
        raise ValueError("it has no trained token")
    for ids, trained in encoded:
        assert len(ids) == len(trained) and not (ids & TRAINED).any()
        if not trained[1:].any():
            continue
        if len(ids) <= room:
            yield ids, trained
        elif limit.too_long == "error":
            raise ValueError(f"it has {len(ids):,} tokens; seq_len {limit.seq_len} has room for {room:,}")
        elif limit.too_long == "drop":
            report.too_long += 1
            report.shortest_dropped = min(report.shortest_dropped or len(ids), len(ids))
        elif trained[1:room].any():
            report.truncated += 1
            yield ids[:room], trained[:room]
        else:
            report.nothing_left += 1
