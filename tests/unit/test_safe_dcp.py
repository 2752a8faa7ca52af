"""DCP folders of anybody: no code of theirs runs, and what is not whole is not read."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from lora_converter.titan.safe_dcp import METADATA_FILE, load, read_metadata


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def test_what_dcp_writes_is_read(folder: Path) -> None:
    found = {"w": torch.zeros(3, 4), "empty": torch.zeros(0, 4), "step": 0, "loader": b""}
    load(found, folder, no_dist=True)
    assert torch.equal(found["w"], state()["w"]) and found["step"] == 7 and pickle.loads(found["loader"]) == {"at": 3}
    assert set(read_metadata(folder).state_dict_metadata) == set(state())


def test_code_in_the_metadata_is_named_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = RunsCode(tmp_path / "ran")
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    for read in (read_metadata, lambda path: load({"w": torch.zeros(3, 4)}, path, no_dist=True)):
        with pytest.raises(ValueError, match=r"\.metadata names posix\.mkdir, which could run code when it is read"):
            read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrapped", [False, True], ids=["a value", "a data loader's state"])
def test_code_in_a_value_is_named_and_does_not_run(wrapped: bool, tmp_path: Path) -> None:
    value: Any = RunsCode(tmp_path / "ran")
    dcp.save({"value": pickle.dumps(value) if wrapped else value}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ValueError, match=r"could not be read: (value|.*) names posix\.mkdir, which could run code"):
        load({"value": None}, tmp_path / "dcp", no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_what_the_user_calls_safe_is_read(tmp_path: Path) -> None:
    value = pickle.dumps(torch.Generator)
    dcp.save({"value": value}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ValueError, match="allow that with torch"):
        load({"value": None}, tmp_path / "dcp", no_dist=True)
    found: dict[str, Any] = {"value": None}
    with torch.serialization.safe_globals([torch.Generator, (torch.Generator, "torch._C.Generator")]):
        load(found, tmp_path / "dcp", no_dist=True)
    assert found["value"] == value


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


def test_a_claim_of_gigabytes_is_not_allocated(folder: Path) -> None:
    """Protocol 4's BYTEARRAY8 and LONG_BINPUT with sizes that are not there: C's unpickler would allocate them."""
    for opcode in (b"\x96" + (2**40).to_bytes(8, "little"), b"Nr" + (2**31 - 1).to_bytes(4, "little") + b"."):
        (folder / METADATA_FILE).write_bytes(b"\x80\x05" + opcode)
        with pytest.raises(ValueError, match=r"\.metadata"):
            read_metadata(folder)
