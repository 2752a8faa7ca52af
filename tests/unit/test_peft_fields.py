"""What an adapter_config.json can say: every field of PEFT's is in one table, and the table is in the docs."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_peft_directory import an_adapter

from lora_converter import LoRAConfig, adapter_state_dict, apply_lora
from lora_converter.cli import main
from lora_converter.hf.peft_config import FIELDS
from lora_converter.hf.peft_patterns import exact_pattern, match_pattern
from lora_converter.merge import merge_directories
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, from_model, into_model, load_peft, save_peft

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_peft(an_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


def say(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_table_has_every_field_that_peft_has_and_no_other() -> None:
    """A new release of PEFT makes this red, and no model wrong."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} == FIELDS.keys()


def test_the_table_is_in_the_docs() -> None:
    shown = (ROOT / "docs" / "peft.md").read_text()
    missing = [row for row in docs_rows() if row not in shown]
    assert not missing, "\n".join(missing)


def docs_rows() -> list[str]:
    """`python -c "import test_peft_fields as t; print(*t.docs_rows(), sep='\\n')"` in tests/unit prints them."""
    rows = []
    for name, field in FIELDS.items():
        allowed = "" if field.does == "ignored" else field.allowed.replace("|", "\\|")
        rows.append(f"| `{name}` | {field.does} | {allowed} | {field.why} |")
    return rows


def test_what_peft_writes_by_default_is_read(folder: Path) -> None:
    default = json.loads(json.dumps(LoraConfig(r=3, lora_alpha=6, use_rslora=True).to_dict(), default=str))
    say(folder, **default)
    assert load_peft(folder).rank == 3


ON: dict[str, Any] = {
    "bias": "all",
    "lora_bias": True,
    "ensure_weight_tying": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 2], [1, 3]],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"n": 1},
    "velora_config": {"rank": 1},
    "megatron_config": {"size": 1},
    "init_lora_weights": "corda",
}


def test_every_refused_field_is_tried_below() -> None:
    assert ON.keys() == {name for name, field in FIELDS.items() if field.does == "refused"}


@pytest.mark.parametrize("name", ON)
def test_what_changes_the_meaning_is_refused_with_field_and_value(name: str, folder: Path) -> None:
    say(folder, **{name: ON[name]})
    with pytest.raises(ValueError) as error:
        load_peft(folder)
    assert f"{CONFIG_FILE}: {name} = {ON[name]!r} is not supported; it must be " in str(error.value)


@pytest.mark.parametrize("init", ["PiSSA", "pissa_niter_16", "corda", "loftq", "lora_ga", "something_new", 1])
def test_factors_of_a_changed_base_that_cannot_be_had_again_are_refused(init: str, folder: Path) -> None:
    say(folder, init_lora_weights=init)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        load_peft(folder)


@pytest.mark.parametrize(("said", "init"), [("pissa", "pissa"), ("olora", "olora"), ("OLoRA", "olora"), (True, "")])
def test_factors_of_a_changed_base_that_can_be_had_again_are_known_as_such(said: Any, init: str, folder: Path) -> None:
    say(folder, init_lora_weights=said)
    assert load_peft(folder).init == init


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_how_factors_began_does_not_matter_where_the_base_was_left_alone(init: Any, folder: Path) -> None:
    say(folder, init_lora_weights=init, eva_config={"rho": 2.0}, corda_config=None, revision="main")
    assert load_peft(folder).rank == 3


@pytest.mark.parametrize(
    ("value", "read"), [(None, True), (False, True), ({}, True), ([], True), (1, False), ("x", False)]
)
def test_a_field_that_nobody_knows_must_be_off(value: Any, read: bool, folder: Path) -> None:
    say(folder, use_telepathy=value)
    if read:
        assert load_peft(folder).rank == 3
    else:
        with pytest.raises(ValueError, match=r"use_telepathy = .* is not supported: the field is newer than PEFT"):
            load_peft(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora = 'false'; it must be true or false."),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out = 1; it must be true or false."),
        ({"lora_alpha": "32"}, "lora_alpha = '32'; it must be a finite number above 0."),
        ({"lora_alpha": True}, "lora_alpha = True; it must be a finite number above 0."),
        ({"r": 2.0}, "r = 2.0; it must be an integer of at least 1."),
        ({"lora_dropout": "0.1"}, "lora_dropout = '0.1'; it must be a number of at least 0 and below 1."),
        ({"target_modules": [1]}, "target_modules = [1]; it must be a string or a list of strings."),
        ({"alpha_pattern": {"q": True}}, "alpha_pattern = {'q': True}; it must be a table from expressions to numbers"),
        ({"rank_pattern": ["q"]}, "rank_pattern = ['q']; it must be a table from expressions to integers"),
        ({"use_dora": "false"}, "use_dora = 'false'; it must be true or false."),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is no regular expression"),
    ],
)
def test_a_value_of_another_type_is_named(fields: dict[str, Any], message: str, folder: Path) -> None:
    say(folder, **fields)
    with pytest.raises(ValueError) as error:
        load_peft(folder)
    assert message in str(error.value)


def test_missing_rank_and_alpha_are_pefts_defaults(tmp_path: Path) -> None:
    save_peft(an_adapter(rank=8), tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_FILE
    config = {n: v for n, v in json.loads(path.read_text()).items() if n not in ("r", "lora_alpha")}
    path.write_text(json.dumps(config))
    adapter = load_peft(tmp_path / "adapter")
    assert (adapter.rank, adapter.alpha) == (LoraConfig().r, LoraConfig().lora_alpha) == (8, 8)


def square_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def test_one_reader_refuses_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merging, inspecting and loading; a job's initial_adapter_path is in test_peft_import.py."""
    model = square_model()
    apply_lora(model, LoRAConfig(rank=2))
    save_peft(from_model(model), tmp_path / "adapter")
    say(tmp_path / "adapter", init_lora_weights="loftq")
    (tmp_path / "base").mkdir()
    save_file(square_model().state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="init_lora_weights = 'loftq'"):
        merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="init_lora_weights = 'loftq'"):
        into_model(load_peft(tmp_path / "adapter"), model)
    for command in (
        ["inspect", str(tmp_path / "adapter")],
        [
            "merge",
            "--base",
            str(tmp_path / "base"),
            "--adapter",
            str(tmp_path / "adapter"),
            "--output",
            str(tmp_path / "x"),
        ],
    ):
        assert main(command) == 1 and "init_lora_weights = 'loftq'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# Orientation


def merged(tmp_path: Path, flag: bool, config: dict[str, Any] | None) -> torch.Tensor:
    """The weight of a square linear, merged with an adapter that says `flag`."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({"h.0.attn.c_proj.weight": torch.zeros(6, 6)}, base / "model.safetensors")
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))
    a, b = torch.arange(6.0).view(1, 6), torch.ones(6, 1)
    adapter = PeftAdapter({"h.0.attn.c_proj": (a, b)}, 1, 1.0, 0.0, False, ["c_proj"], fan_in_fan_out=flag)
    save_peft(adapter, tmp_path / "adapter")
    merge_directories(base, tmp_path / "adapter", tmp_path / "merged")
    return load_file(tmp_path / "merged" / "model.safetensors")["h.0.attn.c_proj.weight"]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("config", "transposed"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}, None),
        (None, None),
    ],
    ids=["gpt2", "llama", "code of its own", "no config"],
)
def test_a_square_weight_lies_as_its_model_says_and_else_as_the_adapter_says(
    config: dict[str, Any] | None, transposed: bool | None, flag: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = merged(tmp_path, flag, config)
    update = torch.ones(6, 1) @ torch.arange(6.0).view(1, 6)  # (out, in)
    wanted = flag if transposed is None else transposed
    assert torch.equal(weight, update.t() if wanted else update)
    told = "nothing tells whether its square weight is stored transposed" in caplog.text
    assert told is (transposed is None)


# Ranks and alphas of single modules


def test_peft_takes_the_first_expression_that_matches_an_end_of_the_name() -> None:
    table = {"q_proj": 1, r"layers\.1\..*": 2, "self_attn.k_proj": 3}
    found = {
        name: match_pattern(table, name, 9, "it")
        for name in ("a.q_proj", "xq_proj", "a.layers.1.q_proj", "a.layers.1.v", "l.self_attn.k_proj", "layers.11.v")
    }
    assert list(found.values()) == [1, 9, 1, 2, 3, 9]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_that_is_written_gives_each_module_its_own(seed: int) -> None:
    """Names that are ends of others, too: PEFT takes `q` for `a.q`."""
    generator = torch.Generator().manual_seed(seed)
    names = ["q", "a.q", "b.a.q", "layers.1.q", "layers.11.q", "x.layers.1.q", "odd+name.q", "k"]
    values = {name: int(torch.randint(1, 4, (), generator=generator)) for name in names}
    table = exact_pattern(values, 1, names)
    for ordered in (sorted(table), sorted(table, reverse=True)):  # PEFT sorts what it saves
        again = {key: table[key] for key in ordered}
        assert {name: match_pattern(again, name, 1, "it") for name in names} == values


def patterned() -> tuple[nn.Module, LoRAConfig]:
    config = LoRAConfig(
        rank=2, alpha=4.0, rank_pattern={"[1]": 3, "2.*": 4}, alpha_pattern={"2.0": 1.5}, use_rslora=True
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    apply_lora(model, config)
    for linear in (model[0], model[1], *model[2]):
        nn.init.normal_(linear.lora_b.weight)
    return model, config


def test_each_linear_has_its_rank_and_scaling_out_and_in_again(tmp_path: Path) -> None:
    model, config = patterned()
    linears = [model[0], model[1], *model[2]]
    assert [linear.lora_config.rank for linear in linears] == [2, 3, 4, 4]
    assert [linear.lora_config.scaling for linear in linears] == [4 / 2**0.5, 4 / 3**0.5, 1.5 / 4**0.5, 4 / 4**0.5]
    save_peft(from_model(model), tmp_path / "adapter")
    adapter = load_peft(tmp_path / "adapter")
    assert [adapter.rank_of(name) for name in ("0", "1", "2.0", "2.1")] == [2, 3, 4, 4]
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    apply_lora(again, config)
    into_model(adapter, again)
    expected, found = adapter_state_dict(model), adapter_state_dict(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    x = torch.randn(2, 6)
    assert torch.equal(model(x), again(x))
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    apply_lora(other, LoRAConfig(rank=2, alpha=4.0, rank_pattern=config.rank_pattern, use_rslora=True))
    with pytest.raises(ValueError, match=r"scaling is 0\.75, that of 2\.0 2: give apply_lora rank = 4, alpha = 1\.5"):
        into_model(adapter, other)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"rank_pattern": {"3": 4}},
            "lora.rank_pattern: '3' matches no adapted linear of the model; the adapted linears",
        ),
        ({"rank_pattern": {"2.*": 4, "2.0": 5}}, "lora.rank_pattern: '2.*' gives 2.0 4, '2.0' gives it 5. Keep one."),
        ({"alpha_pattern": {"1": 0}}, "lora.alpha_pattern['1'] = 0: must be a finite number above 0."),
        ({"rank_pattern": {"1": 2.0}}, "lora.rank_pattern['1'] = 2.0: must be an integer of at least 1."),
        ({"rank_pattern": [4]}, "lora.rank_pattern = [4]: must be a table from patterns to numbers."),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    with pytest.raises(ValueError) as error:
        apply_lora(model, LoRAConfig(**patterns))
    assert message in str(error.value)


# Names


def test_keys_with_an_adapters_name_and_with_wrappers_are_read(folder: Path) -> None:
    expected = load_peft(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    renamed = {
        f"module.{key}".replace(".lora_A.weight", ".lora_A.default.weight").replace(
            "layers.0", "layers._orig_mod.0"
        ): value
        for key, value in tensors.items()
    }
    save_file(renamed, folder / WEIGHTS_FILE)
    found = load_peft(folder)
    assert found.factors.keys() == expected.factors.keys()
    assert all(
        map(torch.equal, found.factors["model.layers.0.mlp.up_proj"], expected.factors["model.layers.0.mlp.up_proj"])
    )
    save_file({**tensors, **{key: value.clone() for key, value in renamed.items()}}, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"lora_A of .* is there twice"):
        load_peft(folder)


def test_the_line_that_converts_pickled_weights_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    expected = load_peft(folder)
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match="pickled weights are not read") as error:
        load_peft(folder)
    command = str(error.value).split("convert it in its folder: ")[1]
    subprocess.run(command.replace("python", __import__("sys").executable, 1), shell=True, check=True, cwd=folder)
    found = load_peft(folder)
    assert all(
        torch.equal(a, b) for m in expected.factors for a, b in zip(expected.factors[m], found.factors[m], strict=True)
    )


def test_a_dtype_that_is_too_narrow_is_refused_and_nothing_written(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    adapter = PeftAdapter({"q": (torch.full((1, 4), 1e6), torch.ones(4, 1))}, 1, 1.0, 0.0, False, ["q"])
    with pytest.raises(ValueError, match=r"q\.lora_A\.weight would hold inf in torch\.float16"):
        save_peft(adapter, tmp_path / "adapter", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_peft(adapter, tmp_path / "adapter", dtype=torch.bfloat16)
