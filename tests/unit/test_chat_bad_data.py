"""Records that cannot be used are told once, with their lines; what is too long or empty is dropped or refused."""

from pathlib import Path
from unittest import mock

import pytest
from chat_words import (
    Untouchable,
    Words,
    built,
    conversations,
    expected,
    ids_of,
    in_processes,
    said,
    texts,
    write_lines,
)

from lora_converter.chat.crew import Crew
from lora_converter.chat.rows import IGNORED, Rows

pytestmark = pytest.mark.usefixtures("small_parts")


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
