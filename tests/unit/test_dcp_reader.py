"""DCP folders of anybody: no code of theirs runs, and what is not whole is not read."""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from memory import Resident
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from lora_converter.dcp.folder import check_fits
from lora_converter.dcp.reader import METADATA_FILE, load, read_metadata


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def state() -> dict[str, Any]:
    return {
        "w": torch.arange(12.0).view(3, 4),
        "empty": torch.zeros(0, 4),
        "step": 7,
        "loader": pickle.dumps({"at": 3}),
    }


def read(state_dict: dict[str, Any], path: Path) -> None:
    load(state_dict, path, read_metadata(path), no_dist=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def test_what_dcp_writes_is_read(folder: Path) -> None:
    found = {"w": torch.zeros(3, 4), "empty": torch.zeros(0, 4), "step": 0, "loader": b""}
    read(found, folder)
    assert torch.equal(found["w"], state()["w"]) and found["step"] == 7 and pickle.loads(found["loader"]) == {"at": 3}
    assert set(read_metadata(folder).state_dict_metadata) == set(state())


def test_code_in_the_metadata_is_named_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = RunsCode(tmp_path / "ran")
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    for reader in (read_metadata, lambda path: read({"w": torch.zeros(3, 4)}, path)):
        with pytest.raises(ValueError, match=r"\.metadata names posix\.mkdir, which could run code when it is read"):
            reader(folder)
    assert not (tmp_path / "ran").exists()


WRAPPED = {
    "a value": lambda value: value,
    "a data loader's state": pickle.dumps,
    "the same in the oldest protocol": lambda value: pickle.dumps(value, protocol=0),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_code_in_a_value_is_named_and_does_not_run(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """torchtitan's data loader calls pickle.loads on what it is given under its names."""
    state = {"dataloader.dp_rank_0": wrap(RunsCode(tmp_path / "ran"))}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ValueError, match=r"could not be read: dataloader\.dp_rank_0 names posix\.mkdir, which could"):
        read({"dataloader.dp_rank_0": None}, tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


def test_what_the_user_calls_safe_is_read(tmp_path: Path) -> None:
    state = {"dataloader.dp_rank_0": pickle.dumps({"order": collections.deque([3, 4])})}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found: dict[str, Any] = {"dataloader.dp_rank_0": None}
    with pytest.raises(ValueError, match=r"names collections\.deque, .* allow that with torch\.serialization"):
        read(found, tmp_path / "dcp")
    with torch.serialization.safe_globals([collections.deque]):
        read(found, tmp_path / "dcp")
    assert found == state


def test_classes_are_not_changed_by_what_is_read(folder: Path) -> None:
    """A pickle may fill an object with attributes, and a class is an object: of the whole process."""
    poison = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x06\x00\x00\x00__eq__ctorch\nSize\ns\x86b."
    (folder / METADATA_FILE).write_bytes(poison)
    with pytest.raises(ValueError, match=r"\.metadata is damaged \(TypeError: it changes a type\)"):
        read_metadata(folder)
    assert Metadata.__eq__(read_metadata, 1) is NotImplemented


def test_paths_of_python_3_13_are_known(folder: Path) -> None:
    data = (folder / METADATA_FILE).read_bytes()
    name = b"\x8c\x07pathlib"  # SHORT_BINUNICODE and its length
    assert data.count(name) == 1
    pickled = pickle.loads(data)
    text = pickle.dumps(pickled, protocol=2)  # which has no frames whose lengths would change
    assert text.count(b"cpathlib\n") == 1
    (folder / METADATA_FILE).write_bytes(text.replace(b"cpathlib\n", b"cpathlib._local\n"))
    assert read_metadata(folder).state_dict_metadata.keys() == state().keys()


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / METADATA_FILE).unlink(), "is not a complete DCP checkpoint, it has no .metadata file."),
        (lambda f: (f / "__0_0.distcp").unlink(), "is not complete: __0_0.distcp is missing."),
        (lambda f: truncate(f / "__0_0.distcp", 100), "is not complete: __0_0.distcp is cut short"),
        (lambda f: truncate(f / METADATA_FILE, 300), ".metadata is damaged"),
        (lambda f: (f / METADATA_FILE).write_bytes(pickle.dumps({"w": 1})), "holds a dict, no DCP metadata."),
    ],
    ids=["no metadata", "no data", "data cut short", "metadata cut short", "something else"],
)
def test_what_is_not_whole_is_named(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError) as error:
        read_metadata(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def rewritten(change: Callable[[Metadata], None], folder: Path) -> str:
    metadata = read_metadata(folder)
    change(metadata)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError) as error:
        read_metadata(folder)
    return str(error.value)


def storage(metadata: Metadata, **fields: Any) -> None:
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "w")
    for name, value in fields.items():
        setattr(info, name, value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "deep/file"])
def test_files_outside_the_folder_are_refused(name: str, folder: Path) -> None:
    message = rewritten(lambda m: storage(m, relative_path=name), folder)
    assert message == f"{folder}/.metadata names {name!r}, which is not in its folder."


def test_sizes_that_the_files_do_not_have_are_refused(folder: Path) -> None:
    def larger(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w"]
        entry.size = entry.chunks[0].sizes = torch.Size([2**40, 4])

    assert "is damaged: w is not in the folder's files." in rewritten(larger, folder)


def test_parts_that_do_not_make_up_the_tensor_are_refused(folder: Path) -> None:
    """DCP itself would leave the rest of the tensor as it was, without a word."""

    def halve(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size([1, 4])

    assert "is damaged: the parts of w do not make it up." in rewritten(halve, folder)


@pytest.mark.parametrize("fields", [{"offset": -1}, {"length": 2**40}, {"relative_path": None}, {"offset": "x"}])
def test_places_that_are_none_are_refused(fields: dict[str, Any], folder: Path) -> None:
    assert str(folder) in rewritten(lambda m: storage(m, **fields), folder)


BOMBS = {
    "a bytearray that is not there": b"\x80\x05\x96" + (2**30).to_bytes(8, "little"),
    "an index of a table": b"\x80\x05Nr" + (2**30).to_bytes(4, "little") + b".",
    "a path that doubles": b"\x80\x02cpathlib\nPosixPath\nq\x00X\x01\x00\x00\x00a\x85Rq\x01"
    + b"0h\x00h\x01h\x01\x86Rq\x01" * 26
    + b".",
    "a size that is a list": pickle.dumps(
        Metadata(
            {"w": TensorStorageMetadata(TensorProperties(), [2**27, (0,)], [ChunkStorageMetadata([0], [2**27, (0,)])])},
            storage_data={},
        )
    ),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_small_files_do_not_become_large_ones(data: bytes, folder: Path) -> None:
    (folder / METADATA_FILE).write_bytes(data)
    memory = Resident()
    with pytest.raises(ValueError, match=r"\.metadata"):
        read_metadata(folder)
    assert memory.peak() < 2**24 + 64 * len(data)


def test_a_data_loader_is_given_what_was_read_and_not_another_reading_of_it(tmp_path: Path) -> None:
    """Python's unpickler keeps an index of 2^27 in a dict; C's would make a table of a gigabyte."""
    state = {"dataloader.dp_rank_0": b"\x80\x04Nr\xff\xff\xff\x07."}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found: dict[str, Any] = {"dataloader.dp_rank_0": None}
    read(found, tmp_path / "dcp")
    assert found["dataloader.dp_rank_0"] == pickle.dumps(None)


class Large:
    def __reduce__(self) -> tuple:
        return bytearray, (2**30,)


def test_values_that_unfold_are_refused(tmp_path: Path, folder: Path) -> None:
    dcp.save({"value": Large()}, checkpoint_id=tmp_path / "large", no_dist=True)
    with pytest.raises(ValueError, match="value holds a bytearray, which is not read"):
        read({"value": None}, tmp_path / "large")
    metadata = read_metadata(folder)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "w")
    data = (folder / info.relative_path).read_bytes()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data[info.offset : info.offset + info.length])) as stored,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    info.offset, info.length = len(data), len(packed.getvalue())
    (folder / info.relative_path).write_bytes(data + packed.getvalue())
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="holds compressed values, which DCP does not write"):
        read({"w": torch.zeros(3, 4)}, folder)


def test_the_names_of_torch_2_2_are_known(folder: Path) -> None:
    text = pickle.dumps(pickle.loads((folder / METADATA_FILE).read_bytes()), protocol=2)
    new, old = (f"ctorch.distributed.{of}.metadata\n".encode() for of in ("checkpoint", "_shard.sharded_tensor"))
    for before, after in ((b"TensorProperties\n",) * 2, (b"_MEM_FORMAT_ENCODING\n", b"MEM_FORMAT_ENCODING\n")):
        assert new + before in text
        text = text.replace(new + before, old + after)
    (folder / METADATA_FILE).write_bytes(text)
    assert read_metadata(folder).state_dict_metadata.keys() == state().keys()


def test_a_weight_that_is_stored_as_a_value_does_not_fit(tmp_path: Path) -> None:
    dcp.save({"w": "hello"}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ValueError, match=r"w is no tensor there and \(2,\) in the model"):
        check_fits({"w": torch.zeros(2)}, read_metadata(tmp_path / "dcp"), "it")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_codes_of_the_shape_of_a_weight_do_not_fit(tmp_path: Path, dtype: torch.dtype) -> None:
    """DCP would cast them to the weight's dtype."""
    stored = {"w": torch.ones(2).to(dtype), "half": torch.ones(2).half(), "count": torch.ones(2).to(dtype)}
    dcp.save(stored, checkpoint_id=tmp_path / "dcp", no_dist=True)
    wanted = {"w": torch.zeros(2), "half": torch.zeros(2), "count": torch.ones(2).to(dtype)}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"1 keys are no weights: w is {name} there and float32 in the model\."):
        check_fits(wanted, read_metadata(tmp_path / "dcp"), "it")
