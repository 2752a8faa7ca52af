"""PEFT directories that do not fit: each refused in its own words, with the model as it was."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import Run, adapter_state, build, full_state
from mutation import mutate
from safetensors.torch import load_file, save_file

from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, load_peft, save_peft

ATTENTION = "model.layers.0.self_attn"
KEY = f"base_model.model.{ATTENTION}"


@pytest.fixture(scope="module")
def run(hf_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A model with adapters of rank 4 on layer 0's wq and wk, its base loaded."""
    folder = tmp_path_factory.mktemp("run")
    base = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    run = build(folder, *base, "--lora.target_modules=layers.0.attention.wq,layers.0.attention.wk")
    run.trainer.checkpointer.load()
    yield run
    run.trainer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What fits that model."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{ATTENTION}.{name}": (torch.randn(4, 64, generator=generator), torch.randn(out, 4, generator=generator))
        for name, out in [("q_proj", 64), ("k_proj", 32)]
    }
    save_peft(PeftAdapter(factors, 4, 32.0, 0.0, False, ["q_proj", "k_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def start_from(run: Run, path: Path) -> None:
    run.trainer.checkpointer.run.config.initial_adapter_path = str(path)
    run.trainer.checkpointer.load()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS_FILE)
        change(stored)
        save_file(stored, folder / WEIGHTS_FILE)

    return write


def put(name: str, *, out: int, size_in: int, rank: int = 4) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{name}.lora_A.weight"] = torch.zeros(rank, size_in)
        stored[f"{name}.lora_B.weight"] = torch.zeros(out, rank)

    return change


def drop(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda stored: [stored.pop(f"{name}.weight") for name in names] and None


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-100])


BAD = {
    "truncated file": (truncate, f"F/{WEIGHTS_FILE} is damaged or no safetensors file"),
    "one key missing": (
        tensors(drop(f"{KEY}.k_proj.lora_B")),
        f"F/{WEIGHTS_FILE}: {ATTENTION}.k_proj has lora_A alone. The file is incomplete.",
    ),
    "one linear missing": (
        tensors(drop(f"{KEY}.k_proj.lora_A", f"{KEY}.k_proj.lora_B")),
        f"F does not fit the model. 1 adapted modules are missing in it: {ATTENTION}.k_proj.",
    ),
    "one linear too many": (
        tensors(put(f"{KEY}.v_proj", out=32, size_in=64)),
        f"F does not fit the model. 1 of its modules have no adapter here: {ATTENTION}.v_proj.",
    ),
    "q_proj where the model has none": (
        tensors(put("base_model.model.model.layers.9.self_attn.q_proj", out=64, size_in=64)),
        "F does not fit the model. 1 of its modules have no adapter here: model.layers.9.self_attn.q_proj.",
    ),
    "wrong rank": (
        tensors(put(f"{KEY}.q_proj", out=64, size_in=64, rank=5)),
        f"F: {ATTENTION}.q_proj: lora_A is (5, 64), lora_B is (64, 5); with r = 4 they must be (r, in) and (out, r).",
    ),
    "wrong width": (
        tensors(put(f"{KEY}.q_proj", out=64, size_in=65)),
        f"F does not fit the model. 1 have another shape: {ATTENTION}.q_proj is (64, 65) there and (64, 64) in the "
        "model.",
    ),
    "wrong height": (
        tensors(put(f"{KEY}.k_proj", out=64, size_in=64)),
        f"F does not fit the model. 1 have another shape: {ATTENTION}.k_proj is (64, 64) there and (32, 64) in the "
        "model.",
    ),
    "no config": (
        lambda folder: (folder / CONFIG_FILE).unlink(),
        f"F has no {CONFIG_FILE}, so it is no PEFT directory.",
    ),
    "a folder of nothing": (
        lambda folder: [(folder / name).unlink() for name in (CONFIG_FILE, WEIGHTS_FILE)],
        "lora.initial_adapter_path: F is not a complete DCP checkpoint, it has no .metadata file. It has no "
        f"{CONFIG_FILE} either, so it is no PEFT directory.",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_does_not_fit_is_named_and_the_model_untouched(name: str, run: Run, folder: Path) -> None:
    spoil, message = BAD[name]
    spoil(folder)
    before = full_state(run)
    with pytest.raises(ValueError) as error:
        start_from(run, folder)
    assert str(error.value).replace(str(folder), "F").startswith(message)
    after = full_state(run)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_nan_is_loaded_with_a_warning(run: Run, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors(lambda stored: stored[f"{KEY}.q_proj.lora_B.weight"].fill_(torch.nan))(folder)
    start_from(run, folder)
    assert f"the factors of {ATTENTION}.q_proj hold nan or inf" in caplog.text
    assert adapter_state(run)["layers.0.attention.wq.lora_b.weight"].isnan().all()


@pytest.mark.parametrize(
    "config",
    [
        # torchtune 0.6 writes these four; later releases of the host write them with rsLoRA.
        {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj"]},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "target_modules": [f"{ATTENTION}.q_proj"], "bias": "none"},
    ],
)
def test_other_writers_of_the_format_are_read(config: dict, run: Run, folder: Path) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    stored = load_file(folder / WEIGHTS_FILE)
    save_file({key: value.bfloat16() for key, value in reversed(stored.items())}, folder / WEIGHTS_FILE)  # no metadata
    start_from(run, folder)
    a = adapter_state(run)["layers.0.attention.wk.lora_a.weight"]
    assert torch.equal(a, stored[f"{KEY}.k_proj.lora_A.weight"].bfloat16().float())


def test_a_file_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / WEIGHTS_FILE
    with pytest.raises(ValueError) as error:
        build(tmp_path / "run", "--checkpoint.initial_load_path=", f"--lora.initial_adapter_path={path}")
    assert str(error.value).startswith(f"lora.initial_adapter_path = '{path}': there is no such folder.")


def test_settings_that_contradict_the_directory_are_refused(folder: Path, hf_base: Path, tmp_path: Path) -> None:
    base = [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"]
    start = [*base, f"--lora.initial_adapter_path={folder}"]
    for option, message in [
        ("--lora.rank=8", f"lora.rank = 8, but the adapter in {folder} has 4. Leave lora.rank out"),
        ("--lora.alpha=64", "lora.alpha = 64.0, but the adapter in "),
        ("--lora.use_rslora", "lora.use_rslora = True, but the adapter in "),
    ]:
        with pytest.raises(ValueError) as error:
            build(tmp_path / "run", *start, option)
        assert message in str(error.value)


def test_of_a_thousand_damaged_directories_none_is_loaded_in_part(run: Run, folder: Path) -> None:
    rng = random.Random(0)
    originals = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(1000):
        before = adapter_state(run)
        name = rng.choice([CONFIG_FILE, WEIGHTS_FILE])
        (folder / name).write_bytes(mutate(originals[name], rng))
        try:
            start_from(run, folder)
        except ValueError:
            expected, outcome = before, "refused"
        else:
            expected, outcome = in_our_names(load_peft(folder), before), "loaded"
        outcomes[outcome] += 1
        after = adapter_state(run)
        assert all(torch.equal(after[key].nan_to_num(7), expected[key].nan_to_num(7)) for key in before)
        (folder / name).write_bytes(originals[name])
    assert outcomes["refused"] > 500 and outcomes["loaded"] > 20, outcomes


def in_our_names(peft: PeftAdapter, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A as it is; B with the rows of Llama's RoPE: halves there, pairs here."""
    found = {}
    for letter, name in [("q", "wq"), ("k", "wk")]:
        a, b = peft.factors[f"{ATTENTION}.{letter}_proj"]
        heads = b.shape[0] // 16
        pairs = b.view(heads, 2, 8, -1).transpose(1, 2).reshape(b.shape)
        found[f"layers.0.attention.{name}.lora_a.weight"] = a.float()
        found[f"layers.0.attention.{name}.lora_b.weight"] = pairs.float()
    assert found.keys() == like.keys()
    return found
