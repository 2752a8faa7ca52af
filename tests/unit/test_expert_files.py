"""The file side of adapters on routed experts: what is refused, by name, and how large a merge gets."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_converter.hf import merged_rows
from lora_converter.hf.aliases import Aliases
from lora_converter.hf.expert_layouts import Dims, goes_over_second, layout_of
from lora_converter.hf.experts import fit_experts
from lora_converter.hf.folder import open_model
from lora_converter.hf.merge_keys import Update
from lora_converter.hf.merge_plan import without_weight
from lora_converter.hf.peft_adapter import PeftAdapter, config_of
from lora_converter.hf.peft_config import CONFIG_FILE, WEIGHTS_FILE
from lora_converter.hf.peft_directory import load_peft, save_peft
from lora_converter.inspect import describe_adapter
from lora_converter.merge import merge_directories

LAYER = "model.layers.1.mlp.experts"
HIDDEN, INNER, EXPERTS, RANK = 8, 6, 3, 2
STACKED = {f"{LAYER}.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN), f"{LAYER}.down_proj": (EXPERTS, HIDDEN, INNER)}
SINGLE = {
    f"{LAYER}.{e}.{product}.weight": (HIDDEN, INNER) if product == "down_proj" else (INNER, HIDDEN)
    for e in range(EXPERTS)
    for product in ("gate_proj", "up_proj", "down_proj")
}


def an_adapter(**factors: tuple[torch.Tensor, torch.Tensor]) -> PeftAdapter:
    return PeftAdapter({f"{LAYER}.{name}": pair for name, pair in factors.items()}, RANK, 4.0, 0.0, False, [])


def stacked() -> PeftAdapter:
    shapes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    torch.manual_seed(0)
    return an_adapter(
        **{name: (torch.randn(EXPERTS, RANK, p), torch.randn(EXPERTS, q, RANK)) for name, (p, q) in shapes.items()}
    )


def single() -> PeftAdapter:
    torch.manual_seed(0)
    factors = {
        name.removesuffix(".weight"): (torch.randn(RANK, taken), torch.randn(out, RANK))
        for name, (out, taken) in SINGLE.items()
    }
    return PeftAdapter(factors, RANK, 4.0, 0.0, False, ["down_proj", "gate_proj", "up_proj"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_peft(stacked(), tmp_path / "adapter")
    return tmp_path / "adapter"


def say(folder: Path, **fields: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop(folder: Path, part: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: value for key, value in tensors.items() if part not in key}, folder / WEIGHTS_FILE)


def test_what_is_written_is_read(folder: Path) -> None:
    adapter = stacked()
    found = load_peft(folder)
    assert found.target_parameters == sorted(adapter.factors)
    for name, (a, b) in adapter.factors.items():
        assert torch.equal(found.factors[name][0], a) and torch.equal(found.factors[name][1], b)
    assert {key: tuple(value.shape) for key, value in load_file(folder / WEIGHTS_FILE).items()} == {
        f"base_model.model.{LAYER}.base_layer.lora_A.weight": (EXPERTS * RANK, HIDDEN),
        f"base_model.model.{LAYER}.base_layer.lora_B.weight": (2 * INNER, EXPERTS * RANK),
        f"base_model.model.{LAYER}.lora_A.weight": (EXPERTS * RANK, INNER),
        f"base_model.model.{LAYER}.lora_B.weight": (HIDDEN, EXPERTS * RANK),
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "has factors of two parameters, and target_parameters names none of its parameters"),
        (["experts.down_proj"], "target_parameters names down_proj. It must say which are meant"),
        (["layers.2.mlp.experts.gate_up_proj", "down_proj"], "names down_proj"),
    ],
)
def test_target_parameters_that_do_not_say_what_is_adapted_are_named(
    parameters: list[str] | None, message: str, folder: Path
) -> None:
    say(folder, target_parameters=parameters)
    with pytest.raises(ValueError, match=message):
        load_peft(folder)
    # What the message says to do.
    say(folder, target_parameters=[f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"])
    assert load_peft(folder).factors.keys() == stacked().factors.keys()


def test_one_pair_of_factors_must_be_of_one_parameter(folder: Path) -> None:
    drop(folder, "base_layer")
    with pytest.raises(ValueError, match=r"factors of one parameter, and target_parameters names down_proj, gate_up_p"):
        load_peft(folder)
    say(folder, target_parameters=["experts.down_proj"])
    assert list(load_peft(folder).factors) == [f"{LAYER}.down_proj"]


def test_factors_of_the_inner_parameter_alone_are_incomplete(folder: Path) -> None:
    drop(folder, "experts.lora_")
    with pytest.raises(ValueError, match="only some factors are there"):
        load_peft(folder)


def test_a_rank_that_does_not_divide_the_factors_is_named(folder: Path) -> None:
    say(folder, rank_pattern={"gate_up_proj": 4})
    with pytest.raises(ValueError, match=r"gate_up_proj: lora_A is \(6, 8\), lora_B is \(12, 6\); with r = 4"):
        load_peft(folder)


def test_one_number_of_experts_must_follow_from_both_ranks(folder: Path) -> None:
    say(folder, rank_pattern={"gate_up_proj": 3})
    with pytest.raises(ValueError, match=r"down_proj has 3 experts with r = 2, and .*gate_up_proj 2 with r = 3"):
        load_peft(folder)


def test_stacks_have_aliases_as_linears_have() -> None:
    there = [name.replace("model.layers", "model.language_model.layers") for name in STACKED]
    adapter = replace(stacked(), alphas={f"{LAYER}.down_proj": 1.0})
    renamed = adapter.renamed(Aliases(there))
    assert set(renamed.factors) == set(there)
    assert renamed.alpha_of(there[1]) == 1.0 and renamed.alpha_of(there[0]) == 4.0


def test_stacks_whose_order_peft_does_not_tell_are_not_written(tmp_path: Path) -> None:
    pair = (torch.ones(EXPERTS, RANK, 4), torch.ones(EXPERTS, 4, RANK))
    with pytest.raises(ValueError, match="no known order of down_proj, up_proj"):
        save_peft(an_adapter(up_proj=pair, down_proj=pair), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_stacks_and_single_experts_become_each_other_and_back() -> None:
    adapter = single()
    there = fit_experts(adapter, STACKED)
    assert {name: tuple(a.shape) for name, (a, _) in there.factors.items()} == {
        f"{LAYER}.gate_up_proj": (EXPERTS, 2 * RANK, HIDDEN),
        f"{LAYER}.down_proj": (EXPERTS, RANK, INNER),
    }
    assert (there.target_modules, there.target_parameters) == ([], [f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj"])
    assert there.alphas == {f"{LAYER}.gate_up_proj": 8.0}
    back = fit_experts(there, SINGLE)
    assert (back.alphas, back.target_modules, back.target_parameters) == ({}, adapter.target_modules, [])
    assert back.factors.keys() == adapter.factors.keys()
    for module, pair in adapter.factors.items():
        assert all(map(torch.equal, back.factors[module], pair))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gate_and_up_of_a_trained_stack_share_a(use_rslora: bool) -> None:
    adapter = replace(stacked(), use_rslora=use_rslora)
    apart = fit_experts(adapter, SINGLE)
    whole = adapter.delta_weight(f"{LAYER}.gate_up_proj")
    for e in range(EXPERTS):
        both = [apart.delta_weight(f"{LAYER}.{e}.{product}") for product in ("gate_proj", "up_proj")]
        torch.testing.assert_close(torch.cat(both), whole[e])
    assert {apart.rank_of(module) for module in apart.factors} == {RANK} and apart.alphas == {}


def test_the_rank_tells_what_a_stack_is_that_was_not_trained() -> None:
    """PEFT's own stacks have one rank; one that it has made of single experts has twice down's, or the adapter's."""
    adapter = stacked()
    zero = {name: (a, torch.zeros_like(b)) for name, (a, b) in adapter.factors.items()}
    gate_up, down = zero[f"{LAYER}.gate_up_proj"], zero[f"{LAYER}.down_proj"]
    of_one_rank = fit_experts(replace(adapter, factors=zero), SINGLE)
    assert of_one_rank.rank_of(f"{LAYER}.0.gate_proj") == RANK == of_one_rank.rank_of(f"{LAYER}.0.down_proj")
    half = {f"{LAYER}.gate_up_proj": gate_up, f"{LAYER}.down_proj": (down[0][:, :1], down[1][..., :1])}
    for there in (replace(adapter, factors=half), replace(adapter, factors=dict(list(half.items())[:1]), rank=1)):
        apart = fit_experts(there, SINGLE)
        assert apart.rank_of(f"{LAYER}.0.gate_proj") == RANK // 2 == 1 and apart.alpha_of(f"{LAYER}.0.up_proj") == 2.0
        assert torch.equal(apart.factors[f"{LAYER}.1.up_proj"][0], gate_up[0][1, 1:])


def test_products_that_no_expert_has_an_adapter_for_get_zeros() -> None:
    adapter = single()
    kept = {module: pair for module, pair in adapter.factors.items() if module.endswith("gate_proj")}
    there = fit_experts(replace(adapter, factors=kept), STACKED)
    assert list(there.factors) == [f"{LAYER}.gate_up_proj"]
    update = there.delta_weight(f"{LAYER}.gate_up_proj")
    assert update[:, :INNER].any() and not update[:, INNER:].any()


def test_stacks_of_an_unknown_model_lie_as_their_shapes_say() -> None:
    turned = {name: (experts, taken, out) for name, (experts, out, taken) in STACKED.items()}
    there, usual = fit_experts(single(), turned), fit_experts(single(), STACKED)
    for name, (a, b) in usual.factors.items():
        # A goes over the last dim.
        assert torch.equal(there.factors[name][0], b.mT) and torch.equal(there.factors[name][1], a.mT)
    back = fit_experts(there, SINGLE)
    assert all(all(map(torch.equal, back.factors[m], pair)) for m, pair in single().factors.items())


def test_gpt_oss_has_gate_and_up_in_turns() -> None:
    turned = {name: (experts, taken, out) for name, (experts, out, taken) in STACKED.items()}
    update = fit_experts(single(), turned, model_type="gpt_oss").delta_weight(f"{LAYER}.gate_up_proj")
    for half, product in enumerate(("gate_proj", "up_proj")):
        torch.testing.assert_close(update[1, half::2], single().delta_weight(f"{LAYER}.1.{product}"))


def test_what_an_old_peft_wrote_is_turned_into_todays_form() -> None:
    factors = {name: (b.mT, a.mT) for name, (a, b) in stacked().factors.items()}
    there = fit_experts(replace(stacked(), factors=factors, peft_version="0.18.0"), STACKED)
    assert there.peft_version == stacked().peft_version
    for name, pair in stacked().factors.items():
        assert all(map(torch.equal, there.factors[name], pair))


def test_settings_that_are_of_linears_alone_leave_stacks_alone() -> None:
    adapter = replace(stacked(), dropout=0.1, fan_in_fan_out=True)
    assert config_of(adapter)["lora_dropout"] == 0.0  # with any other PEFT refuses parameters
    assert adapter.delta_weight(f"{LAYER}.gate_up_proj").shape == (EXPERTS, 2 * INNER, HIDDEN)


def change(adapter: PeftAdapter, name: str, pair: tuple[torch.Tensor, torch.Tensor] | None) -> PeftAdapter:
    factors = {**adapter.factors, f"{LAYER}.{name}": pair}
    return replace(adapter, factors={module: pair for module, pair in factors.items() if pair is not None})


def test_what_does_not_fit_the_stored_experts_is_named() -> None:
    whole, one = single(), (torch.ones(RANK, HIDDEN), torch.ones(INNER, RANK))
    gone = {module: pair for module, pair in whole.factors.items() if "experts.1." not in module}
    four = {name: (a[:1].expand(4, -1, -1), b[:1].expand(4, -1, -1)) for name, (a, b) in stacked().factors.items()}
    cases = [
        (replace(whole, factors=gone), STACKED, "3 experts are one weight .*has none for expert 1"),
        (change(whole, "5.up_proj", one), STACKED, "one for expert 5"),
        (change(whole, "0.up_proj", (torch.ones(4, HIDDEN), torch.ones(INNER, 4))), STACKED, r"\(2, 4.0\), \(4, 4.0\)"),
        (replace(whole, alphas={f"{LAYER}.0.gate_proj": 1.0}), STACKED, r"\(rank, alpha\) \(2, 1.0\), \(2, 4.0\)"),
        (change(whole, "0.up_proj", (torch.ones(RANK, 9), one[1])), STACKED, "is 6 x 9, and in the model 6 x 8"),
        (replace(stacked(), factors=four), STACKED, "3 experts are in the model, and 4 in the adapter"),
        (replace(stacked(), factors=four), SINGLE, "3 experts are in the model, and 4 in the adapter"),
        (stacked(), {f"{LAYER}.gate_up_proj": (EXPERTS, 12, 9)}, "down_proj is not in the model"),
        (stacked(), {**STACKED, f"{LAYER}.gate_up_proj": (EXPERTS, 12, 9)}, "over 8 and 12, of a weight of 12 x 9"),
        (change(stacked(), "1.gate_proj", one), SINGLE, "by itself and in a stack"),
    ]  # fmt: skip
    for adapter, stored, message in cases:
        with pytest.raises(ValueError) as error:
            fit_experts(adapter, stored)
        assert re.match(f"{LAYER}: .*{message}", str(error.value)), message


@pytest.mark.parametrize(
    ("version", "kind", "swapped"),
    [
        ("0.21.2", "qwen3_moe", False),
        ("0.18.1", "qwen3_moe", True),
        ("", "qwen3_moe", True),
        ("0.19.0.dev0", "llama4", True),
        ("0.18.0", "llama4", False),
        ("0.21.2", "gpt_oss", False),
        ("0.17.0", "gpt_oss", False),
    ],
)
def test_the_rule_decides_where_shapes_do_not_tell(version: str, kind: str, swapped: bool) -> None:
    layout = layout_of(kind)

    def is_swapped(factors: Dims, weight: Dims) -> bool:
        """Whether A goes over what experts give. weight: (in_features, out_features)."""
        stored = weight if layout.in_out else weight[::-1]
        return goes_over_second([(factors, stored)], flagged=layout.flagged, version=version) != layout.in_out

    assert is_swapped((8, 8), (8, 8)) is swapped
    assert is_swapped((8, 12), (8, 12)) is False
    assert is_swapped((12, 8), (8, 12)) is True
    with pytest.raises(ValueError, match="factors over 8 and 13"):
        is_swapped((8, 13), (8, 12))


def test_prefixes_and_mixtrals_old_name_are_found() -> None:
    stored = {name.replace("model.layers", "language_model.model.layers"): shape for name, shape in STACKED.items()}
    assert list(fit_experts(stacked(), stored).factors) == [
        f"language_model.{LAYER}.down_proj",
        f"language_model.{LAYER}.gate_up_proj",
    ]
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    mixtral = {
        ".".join([f"model.layers.1.block_sparse_moe.experts.{e}.{names[product]}", "weight"]): SINGLE[key]
        for key in SINGLE
        for e, product in [key.removeprefix(f"{LAYER}.").split(".")[:2]]
    }
    assert {f"{module}.weight" for module in fit_experts(stacked(), mixtral).factors} == mixtral.keys()


def test_thousands_of_experts_take_few_keys() -> None:
    products = ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{n}.mlp.experts.{e}.{p}" for n in range(48) for e in range(128) for p in products]
    pair = (torch.zeros(4, 1), torch.zeros(1, 4))
    adapter = PeftAdapter(
        dict.fromkeys(names, pair), 16, 32.0, 0.0, False, list(products), alphas=dict.fromkeys(names, 8)
    )
    config = config_of(adapter)
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 3


def test_experts_of_several_ranks_in_one_layer_get_a_key_each(tmp_path: Path) -> None:
    adapter = change(single(), "1.up_proj", (torch.ones(5, HIDDEN), torch.ones(INNER, 5)))
    save_peft(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["rank_pattern"] == {f"{LAYER}.1.up_proj": 5}
    found = load_peft(tmp_path / "adapter")
    assert {m: found.rank_of(m) for m in found.factors} == {m: adapter.rank_of(m) for m in adapter.factors}


def save_base(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir()
    torch.manual_seed(3)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_holds_rows_of_one_expert_at_a_time(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = stacked()
    name = f"{LAYER}.gate_up_proj"
    weight = torch.randn(EXPERTS, HIDDEN, 2 * INNER) if transposed else torch.randn(EXPERTS, 2 * INNER, HIDDEN)
    monkeypatch.setattr(merged_rows, "_ELEMENTS_AT_A_TIME", 40)
    parts = list(merged_rows._with_deltas(weight, adapter, Update(name, transposed)))
    assert len(parts) > EXPERTS and max(max(rows.numel(), delta.numel()) for rows, delta in parts) <= 40
    update = torch.cat([delta for _, delta in parts]).view(weight.shape)
    expected = 2 * torch.einsum("eqr,erp->eqp", adapter.factors[name][1], adapter.factors[name][0])
    torch.testing.assert_close(update, expected.mT if transposed else expected)


def test_a_base_with_packed_experts_is_refused_as_quantized(folder: Path, tmp_path: Path) -> None:
    """gpt-oss as it is published: MXFP4."""
    base = tmp_path / "base"
    base.mkdir()
    packed = {
        f"{LAYER}.gate_up_proj_blocks": torch.zeros(EXPERTS, 2 * INNER, 1, 16, dtype=torch.uint8),
        f"{LAYER}.gate_up_proj_scales": torch.zeros(EXPERTS, 2 * INNER, 1, dtype=torch.uint8),
        f"{LAYER}.down_proj_blocks": torch.zeros(EXPERTS, HIDDEN, 1, 16, dtype=torch.uint8),
        f"{LAYER}.down_proj_scales": torch.zeros(EXPERTS, HIDDEN, 1, dtype=torch.uint8),
    }
    save_file(packed, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"gate_up_proj_blocks is quantized \(U8\); merge into an unquantized copy"):
        merge_directories(base, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert without_weight(open_model(base), list(stacked().factors)) == list(stacked().factors)
    # What the message says to do.
    unquantized = save_base(tmp_path / "unquantized", STACKED)
    assert merge_directories(unquantized, folder, tmp_path / "merged") == 2 * EXPERTS


def test_a_weight_is_found_in_whatever_form_the_experts_are_stored(tmp_path: Path) -> None:
    names = [*single().factors, *stacked().factors]
    for shapes in (STACKED, SINGLE):
        base = open_model(save_base(tmp_path / str(len(shapes)), shapes))
        assert without_weight(base, [*names, "model.layers.7.mlp.experts.down_proj"]) == [
            "model.layers.7.mlp.experts.down_proj"
        ]


def test_inspect_shows_experts_as_the_base_stores_them(folder: Path, tmp_path: Path) -> None:
    text = describe_adapter(load_peft(folder))
    assert "2 products of 3 experts" in text and "gate_up_proj  3 experts of 12 x 8  |update|" in text
    text = describe_adapter(load_peft(folder), base=save_base(tmp_path / "base", SINGLE))
    assert "3 products of 3 experts" in text and text.count("% of |weight|") == 3
