import pytest

from lora_converter.targets import select_targets

BLOCK = ["attention.wq", "attention.wo", "feed_forward.w1", "moe.router.gate"]
LINEARS = [f"layers.{i}.{name}" for i in range(12) for name in BLOCK] + ["output"]


def test_all_linear_is_every_linear_but_the_head_and_router_gates() -> None:
    expected = [fqn for fqn in LINEARS if fqn != "output" and not fqn.endswith("gate")]
    assert select_targets(LINEARS, targets=["all-linear"]) == expected


def test_all_linear_leaves_out_the_heads_and_gates_of_transformers_models() -> None:
    names = ["model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head"]
    assert select_targets(names, targets=["all-linear"]) == ["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("wq", [f"layers.{i}.attention.wq" for i in range(12)]),
        ("attention.wq", [f"layers.{i}.attention.wq" for i in range(12)]),
        ("layers.1.attention.wq", ["layers.1.attention.wq"]),
        ("layers.1.*.w?", ["layers.1.attention.wq", "layers.1.attention.wo", "layers.1.feed_forward.w1"]),
        ("layers.1[01].attention.wo", ["layers.10.attention.wo", "layers.11.attention.wo"]),
        ("output", ["output"]),
    ],
)
def test_a_pattern_selects_exactly_what_it_names(pattern: str, expected: list[str]) -> None:
    assert select_targets(LINEARS, targets=[pattern]) == expected


def test_a_name_matches_whole_components_only() -> None:
    with pytest.raises(ValueError, match="'q' matches no linear"):
        select_targets(LINEARS, targets=["q"])


def test_patterns_add_up_in_the_order_of_the_model_and_exclude_takes_away() -> None:
    selected = select_targets(LINEARS, targets=["output", "wq"], exclude=["layers.?.*"])
    assert selected == ["layers.10.attention.wq", "layers.11.attention.wq", "output"]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_without_a_match_is_an_error_that_lists_the_linears(option: str) -> None:
    patterns = {"targets": ["all-linear"], "exclude": []}
    patterns["targets" if option == "target_modules" else "exclude"] = ["wkv"]
    with pytest.raises(ValueError) as error:
        select_targets(LINEARS, **patterns)
    assert str(error.value) == (
        f"lora.{option}: 'wkv' matches no linear of the model; the linears are wq, wo, w1, gate, output."
    )


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        select_targets(LINEARS, targets=["wq"], exclude=["attention.wq"])
    assert str(error.value) == (
        "lora.exclude_modules = ['attention.wq'] leaves nothing of lora.target_modules = ['wq']: "
        "nothing would be adapted. Exclude fewer of wq, wo, w1, gate, output."
    )


def test_a_model_without_linears_says_so() -> None:
    with pytest.raises(ValueError, match="the linears are none"):
        select_targets([], targets=["all-linear"])
