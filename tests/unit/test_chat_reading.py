"""A data path names the files it should, in one order; parts have each record once, with the number of its line."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_words import conversations, write_lines

from lora_converter.chat import reading
from lora_converter.chat.crew import Crew
from lora_converter.chat.hub import fetched
from lora_converter.chat.reading import Broken, count_lines, count_rows, find_files, parts_of, read, sources

Found = list[tuple[int, dict[str, Any] | Broken]]


def files_of(data: Any) -> list[Path]:
    return [file.path for file in find_files(sources(str(data)))]


def everything(path: Path) -> Found:
    """What all parts of a file have, one after the other."""
    [file] = find_files([str(path)])
    numbers = range(-(-file.size // reading.PART_BYTES))
    lines = count_rows(file) if file.is_parquet else [count_lines(file, n) for n in numbers]
    return [entry for part in parts_of(file, lines) for entry in read(part)]


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 1000) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", ".cache/x.jsonl", "deep/.y.jsonl", "info.json", "README.md"):
        write_lines(tmp_path / "data" / name, conversations(1))
    return tmp_path / "data"


def test_a_path_is_a_file_a_folder_a_glob_or_several_of_these(folder: Path) -> None:
    a, b, c = folder / "a.jsonl", folder / "b.jsonl", folder / "deep/er/c.jsonl"
    assert files_of(a) == [a]
    assert files_of(folder) == [a, b, c]
    assert files_of(folder / "info.json") == [folder / "info.json"]
    assert files_of(folder / "*.jsonl") == [a, b]
    assert files_of(folder / "**/*.jsonl") == [a, b, c]
    assert files_of(folder / "d*") == [c]
    assert files_of(f"{b}, {folder},{b},") == [b, a, b, c, b]
    assert [file.label for file in find_files([str(folder)])] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_names_with_commas_and_brackets_are_names(tmp_path: Path) -> None:
    odd = write_lines(tmp_path / "a,b[1].jsonl", conversations(1))
    assert files_of(odd) == [odd]


def test_files_of_one_name_are_told_apart_in_messages(folder: Path) -> None:
    twin = write_lines(folder / "deep" / "a.jsonl", conversations(1))
    assert [file.label for file in find_files([str(folder)])] == [
        str(folder / "a.jsonl"),
        "b.jsonl",
        str(twin),
        "c.jsonl",
    ]


def test_a_link_is_known_by_its_own_ending(tmp_path: Path) -> None:
    blob = write_lines(tmp_path / "blob", conversations(2))
    (tmp_path / "train.jsonl").symlink_to(blob)
    assert len(everything(tmp_path / "train.jsonl")) == 2
    write_parquet(tmp_path / "other", conversations(3))
    (tmp_path / "train.parquet").symlink_to(tmp_path / "other")
    assert len(everything(tmp_path / "train.parquet")) == 3


def test_what_names_nothing_or_something_else_is_refused(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "nothing").mkdir()
    allowed = r"Give \.jsonl, \.json \(one object per line\) or \.parquet files, a folder"
    for given, message in {
        "": rf"^'' names nothing\. {allowed}",
        folder / "x.jsonl": rf"x\.jsonl is no file or folder, and no glob that matches one\. {allowed}",
        folder / "*.txt": rf"\*\.txt is no file or folder, and no glob that matches one\. {allowed}",
        folder / "README.md": rf"README\.md is of another kind\. {allowed}",
        folder / "nothing": r"nothing is a folder with no \.jsonl or \.parquet file",
        folder / "empty.jsonl": r"empty\.jsonl is empty",
        "/dev/null": "is of another kind",
    }.items():
        with pytest.raises(ValueError, match=message):
            files_of(given)


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 41, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_each_line_is_in_one_part_whatever_their_size(
    part_bytes: int, end: str, last_end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", part_bytes)
    rng = random.Random(part_bytes)
    lines = ["" if i % 5 == 3 else json.dumps({"i": i, "x": "é" * rng.randrange(30)}) for i in range(20)]
    data = "\ufeff" + end.join(lines) + end * last_end
    path = tmp_path / "train.jsonl"
    path.write_bytes(data.encode())
    assert everything(path) == [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line]


def test_a_line_that_ends_where_a_part_does_is_in_that_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"i": i} for i in range(8)])  # 9 bytes each with the end
    for part_bytes in (8, 9, 10, 18):
        monkeypatch.setattr(reading, "PART_BYTES", part_bytes)
        assert everything(path) == [(i + 1, {"i": i}) for i in range(8)]


def test_broken_lines_and_other_values_are_told_with_the_lines_after_them(tmp_path: Path) -> None:
    lines = [b'{"a": 1', b"[1]", b"3", b"null", b'"\xff"', b"[" * 100_000, b"true", b'{"a": NaN}', b'{"b": 2}']
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    told = dict(everything(tmp_path / "train.jsonl"))
    why = {line: told.pop(line).why for line in range(1, 8)}
    assert list(told) == [8, 9] and told[9] == {"b": 2}
    assert why[1].startswith("is no JSON (Expecting ',' delimiter")
    assert why[2] == "is a list; each line has to be one JSON object"
    assert [why[i].split(";")[0] for i in (3, 4, 7)] == ["is a number", "is null", "is true or false"]
    assert "utf-8" in why[5] and why[6].endswith(
        "it looks like one list over many lines, and each line has to be one object"
    )


def test_parquet_parts_are_row_groups(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}], "i": i} for i in range(10)]
    path = write_parquet(tmp_path / "train.parquet", rows, group=4)
    [file] = find_files([str(path)])
    assert count_rows(file) == [4, 4, 2]
    assert everything(path) == list(enumerate(rows, 1))


def test_nulls_that_arrow_adds_are_dropped_at_any_depth_and_from_files_of_any_kind(tmp_path: Path) -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    hi, parameters = {"role": "user", "content": "Hi"}, {"type": "object", "required": ["a", None]}
    rows = [
        {"messages": [hi, call(a=1)], "tools": [{"name": "f", "parameters": parameters}], "id": 7},
        {"messages": [hi, call(b="x", c=[{"d": 1}, {"e": 2}, None])]},
        {"messages": [{**hi, "train": False}, {"role": "assistant", "content": "Ho", "thinking": "..."}]},
    ]
    path = write_parquet(tmp_path / "train.parquet", rows)
    padded = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    assert json.dumps(padded).count("null") > 20
    for written in (path, write_lines(tmp_path / "train.jsonl", padded)):
        assert everything(written) == list(enumerate(rows, 1))


def test_parquet_without_conversations_or_rows_is_refused(tmp_path: Path) -> None:
    other = write_parquet(tmp_path / "other.parquet", [{"question": "a", "answer": "b"}])
    none = tmp_path / "none.parquet"
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"messages": pa.array([], pa.string())}), none)
    broken = write_lines(tmp_path / "broken.parquet", conversations(3))
    with pytest.raises(
        ValueError, match=r"other\.parquet has the columns question, answer; a conversation is in messag"
    ):
        everything(other)
    with pytest.raises(ValueError, match=r"none\.parquet has no row"):
        everything(none)
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as parquet \(Parquet magic bytes not found"):
        everything(broken)


def test_a_hub_data_set_becomes_lines_once(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = tmp_path / "org" / "name"
    rows = [{"messages": [{"role": "user", "content": str(i)}], "note": None if i else "x"} for i in range(5)]
    write_lines(source / "train.jsonl", rows)
    write_lines(source / "test.jsonl", rows[:2])
    items = [f"hub:{source}", "other.jsonl", f"hub:{source}:test", f"hub:{source}"]
    train, other, test, again = fetched(items, tmp_path / "hub", Crew())
    assert other == "other.jsonl" and again == train
    expected = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert [record for _, record in everything(Path(train))] == expected
    assert len(everything(Path(test))) == 2
    write_lines(source / "train.jsonl", rows[:1])
    assert fetched(items, tmp_path / "hub", Crew())[0] == train and len(everything(Path(train))) == 5
    with pytest.raises(ValueError, match=r"hub:.*name:dev cannot be loaded by datasets: ValueError: Unknown split"):
        fetched([f"hub:{source}:dev"], tmp_path / "hub", Crew())
    with pytest.raises(ValueError, match=r"'hub:' names no data set. Write hub:org/name"):
        fetched(["hub:"], tmp_path / "hub", Crew())


def test_the_room_needs_no_torch_and_asks_for_arrow_only_when_there_is_some() -> None:
    code = "\n".join(
        [
            "import sys, types",
            "for name in ('torch', 'transformers', 'torchtitan', 'pyarrow', 'datasets'): sys.modules[name] = None",
            "package = types.ModuleType('lora_converter')",  # its own __init__ imports torch
            f"package.__path__ = [{str(Path(reading.__file__).parents[1])!r}]",
            "sys.modules['lora_converter'] = package",
            "import lora_converter.chat.cache, lora_converter.chat.order, lora_converter.chat.rows",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True)
