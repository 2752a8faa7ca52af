"""What is in a cache: every example once and in order, on one side of a split."""

import json
import random
import shutil
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from chat_words import (
    Untouchable,
    Words,
    built,
    conversations,
    expected,
    said,
    texts,
    write_lines,
)

from lora_converter.chat import cache as caches
from lora_converter.chat import survey
from lora_converter.chat.dataset import open_dataset
from lora_converter.chat.parts import COLUMNS, TRAINED

pytestmark = pytest.mark.usefixtures("small_parts")


def test_a_data_set_has_every_example_in_the_order_of_the_files(data: Path, tmp_path: Path) -> None:
    dataset = built(data, tmp_path / "cache").dataset()
    assert texts(dataset) == expected(*range(95))
    assert dataset.lengths.tolist() == [len(said(i).split()) - 1 for i in range(95)]
    for i in range(95):
        assert dataset.example(i)[1].tolist() == [word.endswith("!") for word in said(i).split()]
    assert [dataset.where(i) for i in (0, 59, 60, 94)] == ["a.jsonl:1", "a.jsonl:60", "b.jsonl:1", "b.jsonl:35"]
    words = [said(i).split() for i in range(95)]
    tokens, trained = sum(map(len, words)), sum(word.endswith("!") for text in words for word in text)
    assert dataset.counts.describe() == f"95 conversations, {tokens} tokens, {100 * trained / tokens:.0f} % trained"
    for wrong in (-1, 95):
        with pytest.raises(IndexError, match=f"There are 95 examples, and no {wrong}"):
            dataset.example(wrong)


def test_records_with_several_examples_count_as_one_conversation(tmp_path: Path) -> None:
    records = [{"messages": [said(i), said(i, 3), "untrained here"]} for i in range(20)]
    cache = built(write_lines(tmp_path / "train.jsonl", records), tmp_path / "cache")
    counts = cache.dataset().counts
    assert (counts.conversations, counts.examples) == (20, 40)
    assert counts.describe().startswith("20 conversations, 40 examples, ")
    train, validation = cache.split(0.5)
    assert train.counts.conversations + validation.counts.conversations == 20
    assert train.counts.examples == 2 * train.counts.conversations
    lines = [{side.where(i) for i in range(len(side))} for side in (train, validation)]
    assert not lines[0] & lines[1]


def test_other_data_template_or_settings_are_another_cache_and_the_same_data_elsewhere_is_the_same(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first = built(data, folder)
    others = [
        built(data, folder, encoder=Words("other")),
        built(data, folder, seq_len=63),
        built(data, folder, too_long="truncate"),
        built(data / "a.jsonl", folder),
        built(f"{data / 'b.jsonl'},{data / 'a.jsonl'}", folder),
    ]
    assert len({cache.folder for cache in [first, *others]}) == 6
    differ = [[name for name in first.fingerprint if first.fingerprint[name] != o.fingerprint[name]] for o in others]
    assert differ == [["template"], ["seq_len"], ["too_long"], ["data"], ["data"]]
    shutil.copytree(data, tmp_path / "moved")
    moved = built(tmp_path / "moved", folder, encoder=Untouchable())
    assert (moved.folder, moved.fingerprint) == (first.folder, first.fingerprint)
    with open(data / "b.jsonl", "r+") as file:
        file.write('{"messages": "x60.0')  # as many bytes as before
    assert built(data, folder).folder != first.folder


def test_a_second_start_reads_no_data(data: Path, tmp_path: Path) -> None:
    built(data, tmp_path / "cache")
    with mock.patch.object(survey, "_look", side_effect=AssertionError), mock.patch.object(caches, "make_part", print):
        assert len(built(data, tmp_path / "cache").dataset()) == 95


def test_a_file_that_is_named_twice_is_there_twice_and_made_once(data: Path, tmp_path: Path) -> None:
    a, b, encoder = data / "a.jsonl", data / "b.jsonl", Words()
    cache = built(f"{b},{data},{b}", tmp_path / "cache", encoder=encoder)
    dataset = cache.dataset()
    b_numbers = range(60, 95)
    assert texts(dataset) == expected(*b_numbers, *range(60), *b_numbers, *b_numbers) and encoder.encoded == 95
    assert dataset.counts.conversations == 60 + 3 * 35
    assert dataset.where(0) == dataset.where(95) == "b.jsonl:1" and dataset.where(35) == "a.jsonl:1"
    once = built(f"{b},{a}", tmp_path / "cache", encoder=Untouchable())
    assert once.folder == cache.folder and once.fingerprint["data"] != cache.fingerprint["data"]
    train, validation = cache.split(0.3)
    assert len(train) + len(validation) == 165
    assert not {str(text) for text in texts(train)} & {str(text) for text in texts(validation)}


def test_one_record_files_named_twice_count_twice(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", conversations(1))
    two = write_lines(tmp_path / "two.jsonl", conversations(1, start=1))
    assert built(f"{one},{one},{two},{one}", tmp_path / "cache").dataset().counts.conversations == 4


def test_a_record_keeps_its_side_of_the_split(data: Path, tmp_path: Path) -> None:
    def sides(path: Path, fraction: float) -> tuple[set[str], set[str]]:
        train, validation = built(path, tmp_path / "cache").split(fraction)
        return {str(text) for text in texts(train)}, {str(text) for text in texts(validation)}

    train, validation = sides(data, 0.2)
    assert len(train) + len(validation) == 95 and not train & validation and 9 < len(validation) < 31
    shuffled = [{"messages": said(i), "source": None} for i in random.Random(0).sample(range(140), 140)]
    more = tmp_path / "more.jsonl"
    more.write_text("\n\n".join(json.dumps(record, indent=None, separators=(" , ", ":")) for record in shuffled))
    train_more, validation_more = sides(more, 0.2)
    assert train <= train_more and validation <= validation_more
    train_half, validation_half = sides(data, 0.5)
    assert validation < validation_half and train_half < train


def test_an_empty_side_and_a_wrong_fraction_are_refused(tmp_path: Path) -> None:
    cache = built(write_lines(tmp_path / "train.jsonl", conversations(3)), tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"validation_split 1e-07 of 3 conversations leaves none for validation\. Give"
    ):
        cache.split(1e-7)
    with pytest.raises(ValueError, match=r"leaves none for training"):
        cache.split(1 - 1e-9)
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match=rf"validation_split is {fraction}; a fraction of the data is between"):
            cache.split(fraction)


def test_the_index_of_a_million_examples_is_at_most_16_mb(tmp_path: Path) -> None:
    n, rng = 1_000_000, np.random.default_rng(0)
    columns = {name: np.arange(n) for name in COLUMNS} | {"lengths": np.full(n, 3), "keys": rng.integers(0, 2**32, n)}
    for name, values in columns.items():
        values.astype(COLUMNS[name]).tofile(tmp_path / name)
    (np.arange(4 * n, dtype="<u4") | TRAINED).tofile(tmp_path / "tokens")
    np.arange(0, 4 * n + 1, 4, dtype="<i8").tofile(tmp_path / "starts")
    file = {"records": n, "examples": n, "too_long": 0, "truncated": 0, "nothing_left": 0}
    (tmp_path / "summary.json").write_text(json.dumps({"files": [file], "bad": []}))
    del columns
    shared = (tmp_path / "starts").stat().st_size
    tracemalloc.start()
    whole = open_dataset(tmp_path, {}, ["x"], [0])
    alone = tracemalloc.get_traced_memory()[0]
    train, validation = caches.split_dataset(whole, 0.001)
    split = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert alone < 1e5 and alone + shared + whole.lengths.nbytes < 16e6
    assert split + shared < 16.2e6
    assert len(train) + len(validation) == n and train.example(0)[0].tolist() == list(range(4))
