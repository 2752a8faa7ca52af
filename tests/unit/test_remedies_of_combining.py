"""What the messages about sums of adapters say to do, until the trouble is gone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_combine import EXPERTS, K, Q, an_adapter, saved

from lora_converter.cli import main
from lora_converter.merge import merge_directories
from lora_converter.peft import WEIGHTS_FILE, PeftAdapter, load_peft


def run(*arguments: object, output: Path) -> int:
    return main(["combine", *map(str, arguments), "--output", str(output)])


def a_base(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "tie_word_embeddings": False}))
    generator = torch.Generator().manual_seed(9)
    shapes = {f"{Q}.weight": (8, 6), f"{K}.weight": (4, 6)}
    for number in range(2):
        shapes |= {f"{EXPERTS}.{number}.{name}_proj.weight": (5, 6) for name in ("gate", "up")}
        shapes[f"{EXPERTS}.{number}.down_proj.weight"] = (6, 5)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({**made, **weights}, folder / "model.safetensors")
    return folder


def test_adapters_that_name_two_bases_are_of_one_if_the_user_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = saved(tmp_path / "a", an_adapter(0))
    b = saved(tmp_path / "b", an_adapter(1, base_model="/data/a_copy"))
    assert run(a, b, output=tmp_path / "sum") == 1
    says = "Name adapters of one base, or set --accept-other-base if both names mean the same."
    told = capsys.readouterr().err
    assert "were made for different bases: base" in told and says in told
    assert run(a, b, "--accept-other-base", output=tmp_path / "sum") == 0
    assert run(a, saved(tmp_path / "c", an_adapter(2)), output=tmp_path / "of one base") == 0


def test_a_weight_that_is_no_number_is_written_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "my_adapter", an_adapter(0))
    assert run(f"{a}:0,7", output=tmp_path / "sum") == 1
    assert "'0,7' is no finite number. Write my_adapter:0.7." in capsys.readouterr().err
    assert run(f"{a}:0.7", output=tmp_path / "sum") == 0


def test_other_names_are_changed_to_those_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a", an_adapter(0, modules=(Q,)))
    b = saved(tmp_path / "b", an_adapter(1, modules=tuple(name.removeprefix("model.") for name in (Q, K))))
    assert run(a, b, output=tmp_path / "sum") == 1
    says = f"has another name for {Q.removeprefix('model.')} than the adapters before it"
    told = capsys.readouterr().err
    assert says in told and "Rename its keys to theirs." in told
    prefix = "base_model.model."
    renamed = {key.replace(prefix, f"{prefix}model."): value for key, value in load_file(b / WEIGHTS_FILE).items()}
    save_file(renamed, b / WEIGHTS_FILE)
    assert run(a, b, output=tmp_path / "sum") == 0
    assert load_peft(tmp_path / "sum").factors.keys() == {Q, K}


def test_copies_of_base_weights_are_compared_with_the_base_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = torch.randn(9, 6)
    a, b = saved(tmp_path / "a", an_adapter(0)), saved(tmp_path / "b", an_adapter(1))
    tensors = load_file(b / WEIGHTS_FILE)
    save_file({**tensors, "base_model.model.lm_head.weight": head}, b / WEIGHTS_FILE)
    assert run(a, b, output=tmp_path / "sum") == 1
    says = "and only the base tells whether they are changed. Name its Hugging Face directory with --base."
    assert f"{b} brings lm_head.weight, {says}" in capsys.readouterr().err
    base = a_base(tmp_path / "base", **{"lm_head.weight": head})
    assert run(a, b, "--base", base, output=tmp_path / "sum") == 0
    changed = a_base(tmp_path / "changed", **{"lm_head.weight": head + 1})
    assert run(a, b, "--base", changed, output=tmp_path / "other") == 1
    assert f"{b} brings lm_head.weight of another base than this one" in capsys.readouterr().err


def experts_stacked() -> PeftAdapter:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 2, 6, generator=generator), torch.randn(2, 10, 2, generator=generator)
    name = f"{EXPERTS}.gate_up_proj"
    return PeftAdapter({name: (a, b)}, 2, 4.0, 0.0, False, [], "org/base", target_parameters=[name])


def experts_one_by_one() -> PeftAdapter:
    generator = torch.Generator().manual_seed(4)
    factors = {
        f"{EXPERTS}.{n}.{name}_proj": (torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator))
        for n in range(2)
        for name in ("gate", "up")
    }
    return PeftAdapter(factors, 3, 4.0, 0.0, False, ["gate_proj", "up_proj"], "org/base")


def test_experts_in_two_forms_are_brought_into_that_of_the_base_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved(tmp_path / "a", experts_stacked()), saved(tmp_path / "b", experts_one_by_one())
    assert run(a, f"{b}:0.5", output=tmp_path / "sum") == 1
    says = "in different forms. Name the base's Hugging Face directory with --base."
    assert f"{a} and {b} hold the routed experts of {EXPERTS} {says}" in capsys.readouterr().err
    base = a_base(tmp_path / "base")
    assert run(a, f"{b}:0.5", "--base", base, output=tmp_path / "sum") == 0
    weights = {}
    for name in ("a", "b", "sum"):
        merge_directories(base, tmp_path / name, tmp_path / f"merged {name}")
        weights[name] = load_file(tmp_path / f"merged {name}" / "model.safetensors")
    for key, value in load_file(base / "model.safetensors").items():
        expected = weights["a"][key] + 0.5 * (weights["b"][key] - value)
        torch.testing.assert_close(weights["sum"][key], expected, rtol=1e-5, atol=1e-5)


def test_stacks_of_before_pefts_turn_and_after_are_two_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved(tmp_path / "a", experts_stacked()), saved(tmp_path / "b", experts_stacked(), peft_version="0.18.0")
    assert run(a, b, output=tmp_path / "sum") == 1
    assert "in different forms" in capsys.readouterr().err
    assert run(a, b, "--base", a_base(tmp_path / "base"), output=tmp_path / "sum") == 0
