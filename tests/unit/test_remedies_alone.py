"""What a message says to do where there is no trainer: it is done, and the trouble is gone."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_files import Killed, killed_before
from test_peft_directory import an_adapter, rewrite

from lora_converter.cli import main
from lora_converter.merge import RECORD_FILE, merge_directories
from lora_converter.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftAdapter,
    load_peft,
    save_peft,
    update_peft,
)

Capture = pytest.CaptureFixture[str]


def same(folder: Path, expected: PeftAdapter) -> bool:
    found = load_peft(folder)
    return found.factors.keys() == expected.factors.keys() and all(
        torch.equal(a, b) for m in expected.factors for a, b in zip(expected.factors[m], found.factors[m], strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_peft(an_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


# A PEFT directory


def test_a_damaged_adapter_is_read_once_it_is_copied_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "original")
    os.truncate(folder / WEIGHTS_FILE, 500)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_peft(folder)
    shutil.copytree(tmp_path / "original", folder, dirs_exist_ok=True)
    assert same(folder, an_adapter())


def test_a_field_that_nobody_knows_is_taken_out(folder: Path) -> None:
    rewrite(folder, use_telepathy=1)
    with pytest.raises(
        ValueError, match=rf"is not supported: the field is newer than PEFT .*take it out of {CONFIG_FILE}"
    ):
        load_peft(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["use_telepathy"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert same(folder, an_adapter())


def test_what_a_killed_writer_left_is_renamed_back(folder: Path) -> None:
    with killed_before(2), mock.patch("lora_converter.files.remove"), pytest.raises(Killed):
        save_peft(an_adapter(rank=2), folder, replace=True)
    with pytest.raises(ValueError) as error:
        load_peft(folder)
    left = str(error.value).partition(" is what a writer that was killed left of the last one: rename it back")[0]
    Path(left.split()[-1]).rename(folder)
    assert same(folder, an_adapter())
    save_peft(an_adapter(rank=2), folder, replace=True)
    assert same(folder, an_adapter(rank=2)) and os.listdir(folder.parent) == ["adapter"]


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_the_file_itself_is_put_where_a_device_was(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"is no regular file\. Put the file itself there\."):
        load_peft(folder)
    (folder / name).unlink()
    (tmp_path / name).rename(folder / name)
    assert same(folder, an_adapter())


def test_the_folder_that_holds_both_files_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder\. Name the folder that holds"):
        load_peft(folder / WEIGHTS_FILE)
    assert same((folder / WEIGHTS_FILE).parent, an_adapter())


def test_a_folder_that_exists_is_removed_or_another_one_is_named(folder: Path) -> None:
    with pytest.raises(FileExistsError, match=r"Remove it, or name another folder for the adapter\."):
        save_peft(an_adapter(rank=2), folder)
    save_peft(an_adapter(rank=2), folder.with_name("another"))
    shutil.rmtree(folder)
    save_peft(an_adapter(rank=2), folder)
    assert same(folder, an_adapter(rank=2)) and same(folder.with_name("another"), an_adapter(rank=2))


def test_the_first_of_the_updates_is_written_with_save_peft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Write the first with save_peft\."):
        update_peft(an_adapter(), tmp_path / "adapter")
    save_peft(an_adapter(), tmp_path / "adapter")
    update_peft(an_adapter(rank=2), tmp_path / "adapter")
    assert same(tmp_path / "adapter", an_adapter(rank=2))


def test_a_wider_dtype_holds_what_float16_does_not(tmp_path: Path) -> None:
    adapter = PeftAdapter({"q": (torch.full((1, 4), 2.0**20), torch.ones(4, 1))}, 1, 1.0, 0.0, False, ["q"])
    with pytest.raises(ValueError, match=r"Name a wider dtype, bfloat16 say\."):
        save_peft(adapter, tmp_path / "adapter", dtype=torch.float16)
    save_peft(adapter, tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.equal(load_peft(tmp_path / "adapter").factors["q"][0].float(), adapter.factors["q"][0])


# Merging folders

A, B = "model.layers.0.q", "text_model.layers.0.q"


@pytest.fixture
def merging(tmp_path: Path) -> list[str]:
    """A base in one file, an adapter on one of its two, and the command that merges them into `out`."""
    (tmp_path / "base").mkdir()
    save_file({f"{A}.weight": torch.zeros(4, 4), f"{B}.weight": torch.ones(4, 4)}, tmp_path / "base/model.safetensors")
    factors = {A: (torch.full((1, 4), 2.0), torch.full((4, 1), 2.0**16))}
    save_peft(PeftAdapter(factors, 1, 1.0, 0.0, False, ["q"]), tmp_path / "adapter")
    return [f"--{name}={tmp_path}/{folder}" for name, folder in (("base", "base"), ("adapter", "adapter"))]


def merged(folder: Path) -> bool:
    weights = load_file(folder / "model.safetensors")
    return bool((weights[f"{A}.weight"] == 2.0**17).all() and (weights[f"{B}.weight"] == 1).all())


def test_what_overflows_float16_is_merged_in_a_wider_dtype(merging: list[str], tmp_path: Path, capsys: Capture) -> None:
    command = ["merge", *merging, f"--output={tmp_path}/out", "--dtype"]
    assert main([*command, "float16"]) == 1
    told = capsys.readouterr().err
    assert "does not fit into float16" in told and "Name a wider --dtype, bfloat16 say." in told
    assert main([*command, "bfloat16"]) == 0 and merged(tmp_path / "out")


def test_an_output_that_exists_is_removed_or_another_one_is_named(
    merging: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    command = ["merge", *merging, "--output"]
    assert main([*command, f"{tmp_path}/out"]) == 1
    assert "Remove it, or name another directory for the merged model." in capsys.readouterr().err
    assert main([*command, f"{tmp_path}/other"]) == 0 and merged(tmp_path / "other")
    (tmp_path / "out").rmdir()
    assert main([*command, f"{tmp_path}/out"]) == 0 and merged(tmp_path / "out")


def test_the_directory_of_the_base_is_named(merging: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Name the Hugging Face directory of the base\."):
        merge_directories(tmp_path, tmp_path / "adapter", tmp_path / "out")
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert merged(tmp_path / "out")


def test_keys_that_fit_several_modules_are_renamed_to_the_one_that_is_meant(merging: list[str], tmp_path: Path) -> None:
    path = tmp_path / "adapter" / WEIGHTS_FILE
    save_file({key.replace(A, "transformer.layers.0.q"): value for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"may be any of {A}, {B}"):
        merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    save_file({key.replace("transformer.layers.0.q", A): value for key, value in load_file(path).items()}, path)
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert merged(tmp_path / "out")


def test_a_merged_model_is_inspected_without_its_damaged_record(
    merging: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main(["merge", *merging, f"--output={tmp_path}/out"]) == 0
    (tmp_path / "out" / RECORD_FILE).write_text("{}")
    inspect = ["inspect", f"{tmp_path}/out", f"--base={tmp_path}/base"]
    assert main(inspect) == 1 and "Remove it to inspect the weights without it." in capsys.readouterr().err
    (tmp_path / "out" / RECORD_FILE).unlink()
    assert main(inspect) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("no record of a merge") and f"{A}.weight  4 x 4  |update| 5.243e+05" in shown


def test_an_adapter_is_inspected_beside_the_base_it_was_made_for(
    merging: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "other").mkdir()
    save_file({"c.weight": torch.ones(4, 4)}, tmp_path / "other" / "model.safetensors")
    assert main(["inspect", f"{tmp_path}/adapter", f"--base={tmp_path}/other"]) == 1
    assert "Name the Hugging Face directory that the adapter was made for." in capsys.readouterr().err
    assert main(["inspect", f"{tmp_path}/adapter", f"--base={tmp_path}/base"]) == 0
    assert "% of |weight|" in capsys.readouterr().out
