"""Files and folders appear whole or not at all; what a killed process has left does no harm; the umask holds."""

import json
import os
import stat
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_peft_directory import an_adapter

from lora_converter import LoRAConfig, apply_lora
from lora_converter.files import appears_complete, read_json, remove, write_whole
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, load_peft, save_peft, update_peft
from lora_converter.sync import pack, write_file


class Killed(BaseException):
    """What a test raises where a process would have died: nothing may tidy up behind it."""


def killed_before(call: int) -> mock._patch:
    """Lets the process die before its n-th rename; what it would do on its way out is left undone."""
    rename, calls = os.rename, []

    def die(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) >= call:
            raise Killed
        rename(source, target)

    return mock.patch("lora_converter.files.os.rename", die)


@pytest.mark.parametrize(("rename", "left"), [(1, "old"), (2, "nothing")])
def test_a_writer_that_is_killed_in_the_exchange_leaves_both_whole_and_the_next_goes_on(
    rename: int, left: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    save_peft(an_adapter(rank=2), folder)
    with killed_before(rename), mock.patch("lora_converter.files.remove"), pytest.raises(Killed):
        save_peft(an_adapter(rank=3), folder, replace=True)
    assert load_peft(tmp_path / "adapter.incomplete").rank == 3
    if left == "old":
        assert load_peft(folder).rank == 2
    else:
        with pytest.raises(ValueError, match=r"is what a writer that was killed left of the last one: rename it back"):
            load_peft(folder)
        assert load_peft(tmp_path / "adapter.replaced").rank == 2
    with (
        pytest.raises(OSError, match="full"),
        mock.patch("lora_converter.hf.peft_directory.write_tensors", side_effect=OSError("full")),
    ):
        save_peft(an_adapter(rank=4), folder, replace=True)
    assert load_peft(folder).rank == 2
    save_peft(an_adapter(rank=4), folder, replace=True)
    assert load_peft(folder).rank == 4 and os.listdir(tmp_path) == ["adapter"]


def test_a_killed_update_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_peft(an_adapter(), folder)
    stop = mock.patch("lora_converter.hf.peft_directory.os.replace", side_effect=Killed)
    with stop, mock.patch("lora_converter.hf.peft_directory.remove"), pytest.raises(Killed):
        update_peft(an_adapter(rank=2), folder)
    assert load_peft(folder).rank == 3 and len(os.listdir(tmp_path)) == 2
    update_peft(an_adapter(rank=2), folder)
    assert load_peft(folder).rank == 2 and os.listdir(tmp_path) == ["adapter"]


def test_a_file_is_replaced_whole_and_a_draft_of_a_killed_writer_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "package"
    write_whole(path, b"one")
    (tmp_path / "package.incomplete").write_bytes(b"tw")
    with mock.patch("lora_converter.files.os.replace", side_effect=OSError("busy")), pytest.raises(OSError):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["package"]
    write_whole(path, b"three")
    assert path.read_bytes() == b"three" and os.listdir(tmp_path) == ["package"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    model = apply_lora_to_a_linear()
    before = os.umask(umask)
    try:
        save_peft(an_adapter(), tmp_path / "adapter")
        update_peft(an_adapter(rank=2), tmp_path / "adapter")
        write_file(tmp_path / "package", pack(model, version=0, base=""))
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    files = dict.fromkeys([CONFIG_FILE, WEIGHTS_FILE, "package"], 0o666 & ~umask)
    assert found == {**files, "adapter": 0o777 & ~umask}


def apply_lora_to_a_linear() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    apply_lora(model, LoRAConfig(rank=2))
    return model


def test_links_are_replaced_and_never_written_or_deleted_through(tmp_path: Path) -> None:
    """Somebody else may have put them where the output goes, or where its draft will be."""
    outside = tmp_path / "outside"
    save_peft(an_adapter(), outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    place = tmp_path / "place"
    place.mkdir()
    for name in ("adapter", "adapter.incomplete", "adapter.replaced", "adapter.update"):
        (place / name).symlink_to(outside)
    save_peft(an_adapter(rank=2), place / "adapter", replace=True)
    (place / "adapter" / WEIGHTS_FILE).unlink()
    (place / "adapter" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    update_peft(an_adapter(rank=4), place / "adapter")
    for name in ("package", "package.incomplete"):
        (place / name).symlink_to(outside / WEIGHTS_FILE)
    write_whole(place / "package", b"data")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert load_peft(place / "adapter").rank == 4 and (place / "package").read_bytes() == b"data"
    assert sorted(os.listdir(place)) == ["adapter", "package"] and not (place / "adapter").is_symlink()


def test_a_folder_appears_with_all_that_was_put_into_it(tmp_path: Path) -> None:
    with appears_complete(tmp_path / "made") as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "deep" / "file").read_text() == "x"
    remove(tmp_path / "made")
    remove(tmp_path / "made")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "cannot be read as JSON"),
        (lambda path: path.write_text("[1]"), "holds no JSON object."),
        (lambda path: os.mkfifo(path), "is no regular file. Put the file itself there."),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file. Put the file itself there."),
        (lambda path: path.write_text(" " * (2**24 + 1)), "a file of settings has at most 16777216."),
    ],
    ids=["deep", "no text", "no object", "pipe", "device", "large"],
)
def test_settings_that_are_none_are_refused(write, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / CONFIG_FILE
    write(path)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    (tmp_path / WEIGHTS_FILE).symlink_to("/dev/zero")
    with pytest.raises(ValueError):
        load_peft(tmp_path)


def test_weights_that_are_a_device_are_refused(tmp_path: Path) -> None:
    save_peft(an_adapter(), tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS_FILE).unlink()
    (tmp_path / "adapter" / WEIGHTS_FILE).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"is no regular file\. Put the file itself there\."):
        load_peft(tmp_path / "adapter")


def test_names_in_an_adapter_are_never_paths(tmp_path: Path) -> None:
    """`..` and absolute names are looked up in the base, and not found there."""
    from safetensors.torch import save_file

    from lora_converter.merge import merge_directories

    (tmp_path / "in").mkdir()
    base = tmp_path / "in" / "base"
    base.mkdir()
    save_file({"fine.weight": torch.zeros(4, 4)}, base / "model.safetensors")
    names = ("../../outside", "/etc/outside", "fine")
    tensors = {f"base_model.model.{n}.lora_{x}.weight": torch.ones(2, 4) for n in names for x in "A"}
    tensors |= {f"base_model.model.{n}.lora_B.weight": torch.ones(4, 2) for n in names}
    adapter = tmp_path / "in" / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS_FILE)
    (adapter / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": []}))
    with pytest.raises(ValueError, match=r"\.\./\.\./outside\.weight is not in the base"):
        merge_directories(base, adapter, tmp_path / "in" / "merged")
    save_peft(load_peft(adapter), tmp_path / "in" / "copy")
    assert sorted(os.listdir(tmp_path)) == ["in"] and sorted(os.listdir(tmp_path / "in")) == ["adapter", "base", "copy"]
