"""The PEFT directory: written whole, read strictly. PEFT itself is the peer in integration/test_peft.py."""

import dataclasses
import errno
import json
import os
import struct
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, load_peft, save_peft, update_peft

PREFIX = "base_model.model.model.layers.0"


def an_adapter(rank: int = 3) -> PeftAdapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.0.{name}": (
            torch.randn(rank, size_in, generator=generator),
            torch.randn(size_out, rank, generator=generator),
        )
        for name, size_out, size_in in [("self_attn.q_proj", 8, 6), ("self_attn.k_proj", 4, 6), ("mlp.up_proj", 10, 6)]
    }
    return PeftAdapter(factors, rank, 6.0, 0.1, True, ["q_proj", "k_proj", "up_proj"], "some/base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_peft(an_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_written_is_read(folder: Path) -> None:
    adapter, expected = load_peft(folder), an_adapter()
    assert adapter.factors.keys() == expected.factors.keys()
    for module, factors in expected.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(adapter.factors[module], factors, strict=True))
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.use_rslora) == (3, 6.0, 0.1, True)
    assert adapter.base_model == "some/base" and adapter.target_modules == ["k_proj", "q_proj", "up_proj"]


def test_the_files_are_those_of_the_format(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    text = (folder / CONFIG_FILE).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    with open(folder / WEIGHTS_FILE, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert set(header) == {f"base_model.model.{m}.lora_{x}.weight" for m in an_adapter().factors for x in "AB"}


def test_vllm_would_serve_it(folder: Path) -> None:
    """vLLM reads these fields, ranks up to 512, and refuses DoRA, biases and modules_to_save (its LoRA docs)."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and 1 <= config["r"] <= 512 and config["lora_alpha"] == 6
    assert config["bias"] == "none" and config["use_dora"] is False and config["modules_to_save"] is None
    assert config["use_rslora"] is True and config["target_modules"] == ["k_proj", "q_proj", "up_proj"]
    assert "rank_pattern" not in config and "alpha_pattern" not in config


def test_an_existing_folder_is_left_alone_unless_it_is_an_adapter_to_replace(folder: Path, tmp_path: Path) -> None:
    before = (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        save_peft(an_adapter(), folder)
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    save_peft(an_adapter(rank=2), folder, replace=True)
    assert load_peft(folder).rank == 2
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("text")
    with pytest.raises(FileExistsError):
        save_peft(an_adapter(), tmp_path / "precious", replace=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("what", ["write_tensors", "json.dumps"])
def test_a_full_disk_leaves_no_half_adapter_and_the_old_one(what: str, folder: Path, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for target in (tmp_path / "new", folder):
        with (
            mock.patch(f"lora_converter.hf.peft_directory.{what}", side_effect=full),
            pytest.raises(OSError, match="No space left"),
        ):
            save_peft(an_adapter(rank=2), target, replace=True)
    assert not (tmp_path / "new").exists() and load_peft(folder).rank == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_old_adapter_that_cannot_be_moved_away_stays_and_so_does_its_whole(folder: Path) -> None:
    """A file in use on a network disk: nothing is deleted before the new one is in place."""
    with mock.patch("lora_converter.files.os.rename", side_effect=OSError("busy")), pytest.raises(OSError):
        save_peft(an_adapter(rank=2), folder, replace=True)
    assert load_peft(folder).rank == 3
    rename, calls = os.rename, []

    def fail_second(source, target):  # type: ignore[no-untyped-def]
        calls.append(target)
        if len(calls) == 2:
            raise OSError("busy")
        rename(source, target)

    with mock.patch("lora_converter.files.os.rename", fail_second), pytest.raises(OSError):
        save_peft(an_adapter(rank=2), folder, replace=True)
    assert load_peft(folder).rank == 3 and [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_an_update_in_place_never_shows_a_reader_a_part(folder: Path) -> None:
    """A reader polls while adapters are written over each other: every one it sees is one that was written."""
    written, seen, stop = set(), [], threading.Event()

    def poll() -> None:
        while not stop.is_set():
            a, _ = load_peft(folder).factors["model.layers.0.mlp.up_proj"]
            seen.append(float(a[0, 0]))

    adapter = an_adapter()
    written.add(float(adapter.factors["model.layers.0.mlp.up_proj"][0][0, 0]))
    reader = threading.Thread(target=poll)
    reader.start()
    for number in range(50):
        factors = {module: (a.fill_(number), b) for module, (a, b) in adapter.factors.items()}
        update_peft(dataclasses.replace(adapter, factors=factors), folder)
        written.add(float(number))
    stop.set()
    reader.join()
    assert len(set(seen)) > 2 and set(seen) <= written
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    with pytest.raises(ValueError, match="is no PEFT directory yet"):
        update_peft(adapter, folder.parent / "new")


def rewrite(folder: Path, **settings: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **settings}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_peft(folder)
    return str(error.value).replace(str(folder), "F")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 10**400}, f"lora_alpha = {10**400}; it must be a finite number above 0."),
        (
            {"use_dora": True},
            "use_dora = true, and model.layers.0.mlp.up_proj, model.layers.0.self_attn.k_proj, "
            "model.layers.0.self_attn.q_proj have no lora_magnitude_vector.",
        ),
        (
            {"bias": "all"},
            "bias = 'all' is not supported; it must be 'none' (biases were trained and are stored beside).",
        ),
        (
            {"modules_to_save": [1]},
            "modules_to_save = [1]; it must be a string or a list of strings.",
        ),
        (
            {"rank_pattern": {"q_proj": "8"}},
            "rank_pattern = {'q_proj': '8'}; it must be a table from expressions to integers of at least 1.",
        ),
        ({"use_rslora": "false"}, "use_rslora = 'false'; it must be true or false."),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; only 'LORA' is supported."),
        ({"r": 0}, "r = 0; it must be an integer of at least 1."),
        ({"r": "3"}, "r = '3'; it must be an integer of at least 1."),
        ({"lora_alpha": None}, "lora_alpha = None; it must be a finite number above 0."),
    ],
)
def test_settings_that_are_not_supported_are_named(settings: dict, message: str, folder: Path) -> None:
    rewrite(folder, **settings)
    assert refused(folder) == f"F/{CONFIG_FILE}: {message}"


def test_another_rank_than_the_tensors_is_named_with_the_shapes(folder: Path) -> None:
    rewrite(folder, r=4)
    assert refused(folder) == (
        "F: model.layers.0.mlp.up_proj: lora_A is (3, 6), lora_B is (10, 3); with r = 4 they must be (r, in) and "
        "(out, r)."
    )


def test_half_an_adapter_and_a_foreign_key_are_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{PREFIX}.mlp.up_proj.lora_B.weight"))
    assert refused(folder) == f"F/{WEIGHTS_FILE}: model.layers.0.mlp.up_proj has lora_A alone. The file is incomplete."
    change_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}.norm.weight": torch.ones(2)}))
    assert refused(folder).startswith(f"F/{WEIGHTS_FILE}: '{PREFIX}.norm.weight' is no LoRA factor of a linear")


def test_missing_damaged_and_pickled_files_are_named(folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refused(folder / CONFIG_FILE)
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    assert "is damaged or no safetensors file" in refused(folder)
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "pickled weights are not read: a pickle can run code" in refused(folder)
    (folder / CONFIG_FILE).write_text("{")
    assert "cannot be read as JSON" in refused(folder)
    (folder / CONFIG_FILE).unlink()
    assert refused(folder) == "F has no adapter_config.json, so it is no PEFT directory."


def test_nan_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_tensors(folder, lambda tensors: tensors[f"{PREFIX}.mlp.up_proj.lora_B.weight"].fill_(torch.nan))
    load_peft(folder)
    assert "the factors of model.layers.0.mlp.up_proj hold nan or inf" in caplog.text
