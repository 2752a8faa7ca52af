"""The cache is the same whoever builds it and however often it is killed; bad data is told once, with lines."""

import json
import logging
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from chat_words import Words, built, contents, conversations, ids_of, in_processes, said, write_lines

from lora_converter.chat import cache as caches
from lora_converter.chat import crew as crews
from lora_converter.chat import reading, survey
from lora_converter.chat.crew import Crew
from lora_converter.chat.dataset import Dataset, open_dataset
from lora_converter.chat.parts import COLUMNS, TRAINED
from lora_converter.chat.rows import IGNORED, Rows


@pytest.fixture(autouse=True)
def small_parts_and_little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 1000)
    monkeypatch.setattr(survey, "PARTS_PER_STRETCH", 4)
    monkeypatch.setattr(crews, "POLL", 0.01)
    monkeypatch.setattr(crews, "BEAT", 0.05)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_lines(tmp_path / "data" / "a.jsonl", conversations(60))
    write_lines(tmp_path / "data" / "b.jsonl", conversations(35, start=60))
    return tmp_path / "data"


def texts(dataset: Dataset) -> list[list[int]]:
    return [dataset.example(i)[0].tolist() for i in range(len(dataset))]


def expected(*numbers: int) -> list[list[int]]:
    return [ids_of(said(i)).tolist() for i in numbers]


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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_builds_the_same_bytes(world: int, data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    codes = in_processes(lambda rank: built(data, tmp_path / "cache", crew=Crew(rank, world)) and None, world)
    assert codes == [0] * world
    made = built(data, tmp_path / "cache", encoder=Untouchable())
    assert contents(made) == reference
    assert os.listdir(made.folder.parent) == ["whole"]


def test_slow_tokenising_on_rank_0_all_ranks_share_the_work(data: Path, tmp_path: Path) -> None:
    all_at_it = multiprocessing.get_context("fork").Barrier(3)

    class Together(Words):
        def encode(self, record: dict) -> list:
            if not self.encoded:
                all_at_it.wait(30)  # each has a part of its own now
            return super().encode(record)

    def work(rank: int) -> None:
        encoder = Together()
        built(data, tmp_path / "cache", encoder=encoder, crew=Crew(rank, 3))
        (tmp_path / f"{rank}").write_text(str(encoder.encoded))

    assert in_processes(work, 3) == [0, 0, 0]
    assert sum(int((tmp_path / f"{rank}").read_text()) for rank in range(3)) == 95, "a part was made twice"


def test_one_of_three_ranks_that_never_comes_is_not_waited_for(data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    assert contents(built(data, tmp_path / "cache", crew=Crew(1, 3))) == reference


class Untouchable(Words):
    def encode(self, record: dict) -> list:
        raise AssertionError("it is there already")


class Slow(Words):
    def encode(self, record: dict) -> list:
        time.sleep(0.003)
        return super().encode(record)


def dies_at(call: int) -> Callable:
    """A function that kills the process at its n-th call, and does nothing before."""
    calls = []

    def count(*_: object, **__: object) -> None:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


MOMENTS = {
    **{f"encode {n}": ("chat_words.Words.encode", n) for n in (1, 40, 95)},
    **{f"rename {n}": ("os.rename", n) for n in (1, 4, 5, 6, 20)},
    "writing a report": ("json.dumps", 40),
    **{f"copying {n}": ("shutil.copyfileobj", n) for n in (1, 8)},
    "starts": ("numpy.cumsum", 2),
    "tidying up": ("shutil.rmtree", 1),
}
QUICK = ("encode 1", "encode 95", "rename 20", "copying 8", "tidying up")


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in MOMENTS])
def test_a_build_that_is_killed_goes_on_to_the_same_bytes(moment: str, data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))
    name, call = MOMENTS[moment]
    original, count = pkgutil.resolve_name(name), dies_at(call)

    def killing(*args: object, **kwargs: object) -> object:
        count()
        return original(*args, **kwargs)

    def work(_: int) -> None:
        with mock.patch(name, killing):
            built(data, tmp_path / "cache")

    assert in_processes(work, 1) == [-signal.SIGKILL]
    encoder = Words()
    began = time.monotonic()
    made = built(data, tmp_path / "cache", encoder=encoder)
    assert time.monotonic() - began < crews.PATIENCE / 2, "the claim of a dead process was waited for"
    assert contents(made) == reference and os.listdir(made.folder.parent) == ["whole"]
    if moment == "encode 95":
        assert encoder.encoded < 20, "finished parts were made again"


def test_two_builders_race_for_everything_and_neither_is_harmed(data: Path, tmp_path: Path) -> None:
    reference = contents(built(data, tmp_path / "reference"))

    def work(_: int) -> None:
        with mock.patch.object(crews._Claims, "take", lambda *_: True):  # as if no claim were ever seen
            for i in range(5):
                built(data, tmp_path / f"cache{i}")

    assert in_processes(work, 3) == [0, 0, 0]
    for i in range(5):
        assert contents(built(data, tmp_path / f"cache{i}", encoder=Untouchable())) == reference


def test_a_claim_that_is_renewed_is_respected_and_one_that_is_not_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "PATIENCE", 0.3)
    task = crews.Task(tmp_path / "x", lambda draft: None)
    claim = tmp_path / "x.claim"
    claim.write_text("elsewhere 1")
    began = time.monotonic()

    def sleep_and_renew(_: float, sleep: Callable = time.sleep) -> None:
        sleep(0.01)
        if time.monotonic() - began < 0.6:
            os.utime(claim)

    monkeypatch.setattr(crews.time, "sleep", sleep_and_renew)
    crews.share_work([task], Crew(), what="x")
    assert 0.85 < time.monotonic() - began < 20
    assert sorted(os.listdir(tmp_path)) == ["x"]


def test_the_work_is_logged_with_rate_and_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "LOG_EVERY", 0.05)
    with caplog.at_level(logging.INFO, logger="lora_converter"):
        built(data, tmp_path / "one", encoder=Slow(), crew=Crew(1, 2))
        assert not caplog.messages, "rank 0 speaks for all"
        built(data, tmp_path / "two", encoder=Slow())
    lines = [line for line in caplog.messages if "making tokens" in line]
    assert len(lines) >= 3
    assert all(" parts, 0 of 0 MB, " in line for line in lines) and lines[-1].endswith(" s left.")


def test_bad_records_are_told_once_the_first_five_with_their_lines(tmp_path: Path) -> None:
    one: list = conversations(100)
    two: list = conversations(100, start=100)
    for i in (16, 49):
        one[i] = {"messages": None}
    for i in (3, 4, 50, 99):
        two[i] = {"messages": "none is trained"} if i % 2 else [i]
    write_lines(tmp_path / "data" / "one.jsonl", one)
    write_lines(tmp_path / "data" / "two.jsonl", two)
    message = (
        "6 of 200 records cannot be used: one.jsonl:17: message 0 (user): content is null, not text; one.jsonl:50: "
        "message 0 (user): content is null, not text; two.jsonl:4: it has no trained token; two.jsonl:5: is a list; "
        "each line has to be one JSON object; two.jsonl:51: is a list; each line has to be one JSON object; and 1 "
        "more. Correct or remove them."
    )
    with pytest.raises(ValueError) as error:
        built(tmp_path / "data", tmp_path / "cache")
    assert str(error.value) == message

    def work(rank: int) -> None:
        with pytest.raises(ValueError) as error:
            built(tmp_path / "data", tmp_path / "other", crew=Crew(rank, 2))
        assert str(error.value) == message

    assert in_processes(work, 2) == [0, 0]
    with pytest.raises(ValueError) as error:
        built(tmp_path / "data", tmp_path / "cache", encoder=Untouchable())
    assert str(error.value) == message
    one[16] = one[49] = {"messages": said(0)}
    write_lines(tmp_path / "data" / "one.jsonl", one)
    with pytest.raises(ValueError, match=r"^4 of 200 records cannot be used: two\.jsonl:4: "):
        built(tmp_path / "data", tmp_path / "cache")


def test_a_mistake_in_the_encoder_is_no_bad_record(data: Path, tmp_path: Path) -> None:
    with (
        mock.patch.object(Words, "encode", side_effect=KeyError("x")),
        pytest.raises(RuntimeError, match=r"a\.jsonl:1: KeyError: 'x'"),
    ):
        built(data, tmp_path / "cache")
    assert texts(built(data, tmp_path / "cache").dataset()) == expected(*range(95))


def test_blank_files_and_changing_files_are_refused(data: Path, tmp_path: Path) -> None:
    (data / "c.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"c\.jsonl has no record, only blank lines"):
        built(data, tmp_path / "cache")
    (data / "c.jsonl").unlink()

    class Growing(Words):
        def encode(self, record: dict) -> list:
            with open(data / "a.jsonl", "a") as file:
                file.write("\n")
            return super().encode(record)

    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        built(data, tmp_path / "cache", encoder=Growing())


def test_what_is_too_long_is_dropped_cut_or_refused(tmp_path: Path) -> None:
    texts_in = [
        "a b! c d e!",  # 5 tokens make 4 inputs
        "a b c d! e! f!",
        "a b c d e f!",
        "a! b c d e f!",
        "a b c d e! f",
    ]
    data = write_lines(tmp_path / "train.jsonl", [{"messages": text} for text in texts_in])

    def kept(too_long: str, seq_len: int = 4) -> list[str]:
        dataset = built(data, tmp_path / "cache", seq_len=seq_len, too_long=too_long).dataset()
        assert dataset.lengths.max() <= seq_len
        of_id = {int(ids_of(word)[0]): word for text in texts_in for word in text.split()}
        found = [" ".join(of_id[token] for token in ids) for ids in texts(dataset)]
        for i, text in enumerate(found):
            assert dataset.example(i)[1].tolist() == [word.endswith("!") for word in text.split()]
        counts.append(dataset.counts)
        return found

    counts: list = []
    assert kept("drop") == texts_in[:1]
    assert kept("drop", 5) == texts_in
    assert kept("truncate") == ["a b! c d e!", "a b c d! e!", "a b c d e!"]
    assert [(c.too_long_dropped, c.truncated, c.nothing_left_dropped) for c in counts] == [
        (4, 0, 0),
        (0,) * 3,
        (0, 2, 2),
    ]
    assert [c.trained_tokens for c in counts] == [2, 2 + 3 + 1 + 1 + 1, 2 + 2 + 1]
    dropped = "; 2 truncated to nothing that is trained, dropped"
    assert counts[0].describe() == "1 conversations (4 too long, dropped), 5 tokens, 40 % trained"
    assert counts[2].describe() == f"3 conversations (2 truncated{dropped}), 15 tokens, 33 % trained"
    with pytest.raises(ValueError) as error:
        built(data, tmp_path / "cache", seq_len=4, too_long="error")
    assert str(error.value).startswith(
        "4 of 5 records cannot be used: train.jsonl:2: it has 6 tokens; seq_len 4 has room for 5; train."
    )
    with pytest.raises(ValueError, match=r"chat\.too_long = 'cut': must be one of drop, error, truncate\."):
        kept("cut")
    with pytest.raises(ValueError, match=r"training.seq_len is 0"):
        kept("drop", 0)


def test_mask_off_by_one_at_truncation_a_label_is_kept_where_its_input_is(tmp_path: Path) -> None:
    """One trained token at each place; cut to any length."""
    words = [[f"{place}.{k}" + "!" * (k == place) for k in range(9)] for place in range(1, 9)]
    data = write_lines(tmp_path / "train.jsonl", [{"messages": " ".join(text)} for text in words])
    for seq_len in range(1, 9):
        dataset = built(data, tmp_path / "cache", seq_len=seq_len, too_long="truncate").dataset()
        rows = Rows(dataset, seq_len=seq_len, packing="none")
        labels = [rows.row(k).label.tolist() for k in range(rows.per_epoch)]
        expected = []
        for place in range(1, seq_len + 1):
            trained = int(ids_of(words[place - 1][place])[0])
            expected.append([trained if k == place - 1 else IGNORED for k in range(seq_len)])
        assert sorted(labels) == sorted(expected)


def test_when_nothing_is_left_the_counts_say_why(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "train.jsonl", [{"messages": "a b c d!"}, {"messages": "a b c d e f!"}])
    with pytest.raises(ValueError) as error:
        built(data, tmp_path / "cache", seq_len=2)
    assert str(error.value) == (
        "No example is left of 2 conversations: 2 are too long for training.seq_len 2 (the shortest has 4 tokens). "
        "Raise training.seq_len."
    )
    with pytest.raises(ValueError, match=r"of 2 conversations: 2 have no trained token in their first 3\. Raise"):
        built(data, tmp_path / "cache", seq_len=2, too_long="truncate")


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
