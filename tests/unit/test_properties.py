"""What holds for every pattern, every state dict, every naming of a host and every PEFT directory."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, split_state_dict
from lora_converter.hf.bridge import from_peft, to_peft
from lora_converter.peft import CONFIG_FILE, PeftAdapter, load_peft, save_peft
from lora_converter.targets import ALL_LINEAR, select_targets

# The same examples every time: a red run can be looked into, and CI is not a lottery.
settings.register_profile("here", derandomize=True, database=None, deadline=None, max_examples=200)
settings.load_profile("here")

PARTS = st.sampled_from(["layers", "0", "1", "10", "attention", "wq", "wk", "w1", "w", "q", "gate", "output", "lora_a"])
FQNS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)
GLOBS = st.sampled_from(["*", "?", "w?", "*.wq", "layers.*.w[1q]", "[!w]*", "layers.1.*"])
PATTERNS = st.one_of(PARTS, st.lists(PARTS, min_size=2, max_size=3).map(".".join), GLOBS, st.just(ALL_LINEAR))


def matches(pattern: str, fqn: str) -> bool:
    """The rules of `LoRAConfig.target_modules` once more, by regular expressions."""
    if pattern == ALL_LINEAR:
        return re.search(r"(^|\.)(output|lm_head|gate|router)$", fqn) is None
    if re.search(r"[*?[]", pattern):
        parts = {"*": ".*", "?": ".", "[": "[", "]": "]", "!": "^"}
        return re.fullmatch("".join(parts.get(c, re.escape(c)) for c in pattern), fqn) is not None
    return re.search(rf"(^|\.){re.escape(pattern)}$", fqn) is not None


@given(FQNS, st.lists(PATTERNS, min_size=1, max_size=3), st.lists(PATTERNS, max_size=2))
def test_targets_are_what_the_patterns_say_in_the_models_order_or_an_error(
    linears: list[str], targets: list[str], exclude: list[str]
) -> None:
    expected = [
        fqn for fqn in linears if any(matches(p, fqn) for p in targets) and not any(matches(p, fqn) for p in exclude)
    ]
    idle = [p for p in targets + exclude if not any(matches(p, fqn) for fqn in linears)]
    if idle or not expected:
        with pytest.raises(ValueError) as error:
            select_targets(linears, targets=targets, exclude=exclude)
        assert not idle or repr(idle[0]) in str(error.value)
    else:
        assert select_targets(linears, targets=targets, exclude=exclude) == expected


NAMES = st.sampled_from(["lora_a", "lora_b", "weight_", "block", "wq", "x"])
TREES = st.recursive(
    st.sampled_from(["linear", "norm"]), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=8
)


def a_module(tree: Any) -> nn.Module:
    if isinstance(tree, dict):
        return nn.ModuleDict({name: a_module(inner) for name, inner in tree.items()})
    return nn.Linear(3, 2) if tree == "linear" else nn.LayerNorm(3)


@settings(max_examples=100)
@given(st.dictionaries(NAMES, TREES, min_size=1), st.randoms(use_true_random=False))
def test_a_state_dict_splits_into_the_adapters_and_the_untouched_base(tree: dict, rng: Any) -> None:
    """Also where the base has modules of our names, and names that contain them."""
    model = a_module(tree)
    linears = [fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear)]
    assume(linears)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = rng.sample(linears, rng.randint(1, len(linears)))
    apply_lora(model, LoRAConfig(rank=2, target_modules=chosen))
    state = model.state_dict()
    adapter, rest = split_state_dict(state, model)
    assert adapter.keys() == adapter_parameters(model).keys() and len(adapter) + len(rest) == len(state)
    assert {name: state[name] for name in state if name in rest} == rest
    assert list(rest) == [name for name in state if name in rest] and rest.keys() == base.keys()
    assert all(torch.equal(rest[name], value) for name, value in base.items())


class RandomHost:
    """A StateDictAdapter that renames, permutes rows and columns, and splits by rows, as it was told."""

    def __init__(self, parts: dict[str, tuple[list[int], list[int]]]):
        self.parts = parts

    def to_hf(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (weight,) = state_dict.values()
        return {f"{name}.weight": weight[rows][:, columns] for name, (rows, columns) in self.parts.items()}


@st.composite
def hosts(draw: st.DrawFn) -> tuple[RandomHost, int, int]:
    out_features, in_features = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    rows = draw(st.permutations(range(out_features)))
    cuts = sorted(draw(st.sets(st.integers(1, out_features), max_size=3)) - {out_features})
    bounds = list(zip([0, *cuts], [*cuts, out_features], strict=True))
    parts = {
        f"model.layers.0.part{number}": (list(rows[start:end]), list(draw(st.permutations(range(in_features)))))
        for number, (start, end) in enumerate(bounds)
    }
    return RandomHost(parts), out_features, in_features


@given(hosts(), st.integers(1, 4), st.integers(0, 2**16))
def test_any_renaming_permuting_and_splitting_host_gets_its_part_of_the_update_and_gives_it_back(
    made: tuple[RandomHost, int, int], rank: int, seed: int
) -> None:
    host, out_features, in_features = made
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, in_features), (out_features, rank)))
    state = {"wx.lora_a.weight": a, "wx.lora_b.weight": b}
    names = {"wx.weight": ("wx.lora_a.weight", "wx.lora_b.weight")}
    linears, config = {"wx": (out_features, in_features)}, LoRAConfig(rank=rank, alpha=3.0, use_dora=True)
    of_rows = {"wx.weight": torch.arange(out_features) + 1.0}
    peft = to_peft(host, dict(state), names, linears, config, magnitudes=of_rows)  # type: ignore[arg-type]
    expected = host.to_hf({"wx.weight": config.scaling * (b.double() @ a.double())})
    assert peft.factors.keys() == host.parts.keys()
    for name in peft.factors:  # fp32 products of a few terms against fp64
        torch.testing.assert_close(peft.delta_weight(name).double(), expected[f"{name}.weight"], rtol=1e-5, atol=1e-5)
    scaled = host.to_hf({"wx.weight": of_rows["wx.weight"].unsqueeze(1).expand(-1, in_features)})
    assert all(torch.equal(own, scaled[f"{name}.weight"][:, 0]) for name, own in peft.magnitudes.items())
    back, magnitudes = from_peft(host, peft, names, linears, configs={"wx.weight": config}, what="it")  # type: ignore[arg-type]
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert torch.equal(magnitudes["wx"], of_rows["wx.weight"])


MODULES = st.lists(
    st.from_regex(r"[a-z_]{1,6}(\.[a-z0-9_/]{1,6}){0,3}", fullmatch=True), min_size=1, max_size=5, unique=True
)


@settings(max_examples=60)
@given(
    MODULES,
    st.integers(1, 5),
    st.floats(1e-3, 1e6),
    st.floats(0, 0.99),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.text(max_size=10),
)
def test_every_adapter_that_is_written_is_read(
    modules: list[str], rank: int, alpha: float, dropout: float, rslora: bool, dtype: torch.dtype, base: str
) -> None:
    factors = {
        name: (torch.randn(rank, 1 + len(name)).to(dtype), torch.randn(2 + number, rank).to(dtype))
        for number, name in enumerate(modules)
    }
    written = PeftAdapter(factors, rank, alpha, dropout, rslora, modules, base, base_fingerprint="0123abcd")
    with tempfile.TemporaryDirectory() as folder:
        save_peft(written, Path(folder) / "adapter", dtype=dtype)
        read = load_peft(Path(folder) / "adapter")
    for field in ("rank", "alpha", "dropout", "use_rslora", "base_model", "base_fingerprint", "scaling"):
        assert getattr(read, field) == getattr(written, field), field
    assert read.factors.keys() == factors.keys() and sorted(read.target_modules) == sorted(modules)
    for name, pair in factors.items():
        assert all(torch.equal(a, b) for a, b in zip(read.factors[name], pair, strict=True))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "target_modules", "peft_type"),
    *("base_model_name_or_path", "fan_in_fan_out", "rank_pattern", "modules_to_save", "alpha_pattern"),
]


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_whatever_stands_in_the_settings_is_read_or_refused(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        save_peft(PeftAdapter({"w": (torch.ones(1, 2), torch.ones(2, 1))}, 1, 2.0, 0.0, False, ["w"]), adapter)
        config = json.loads((adapter / CONFIG_FILE).read_text())
        (adapter / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
        try:
            read = load_peft(adapter)
        except ValueError as error:
            assert str(adapter) in str(error)
        else:
            assert read.rank == 1 and 0 < read.alpha < float("inf") and 0 <= read.dropout < 1
            assert isinstance(read.base_model, str) and all(isinstance(name, str) for name in read.target_modules)
