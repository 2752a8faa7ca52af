"""Adapters on routed experts in PEFT's files, against PEFT and transformers themselves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import FUSED_BY_TRANSFORMERS, MODELS, logits, save_fused
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_converter.config import scaling
from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.experts import fit_experts
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.peft_config import CONFIG_FILE, WEIGHTS_FILE
from lora_converter.hf.peft_directory import load_peft, save_peft
from lora_converter.merge import merge_directories

pytestmark = pytest.mark.filterwarnings(
    # PEFT looks for the keys of its patterns among the modules that it adapts, and not among the parameters.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def randomised(model: PreTrainedModel, parameters: list[str], **options: Any) -> PeftModel:
    """PEFT's own adapter, every B away from zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options}
    if "q_b_proj" in dict(model.named_modules()) or model.config.model_type == "deepseek_v3":
        settings["target_modules"] = ["q_b_proj"]
    peft = get_peft_model(model, LoraConfig(target_parameters=parameters, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("form", ["published", "fused"])
@pytest.mark.parametrize(
    "parameters", [EXPERTS, EXPERTS[:1], ["down_proj"]], ids=["both products", "gate and up", "down"]
)
@pytest.mark.parametrize("name", MODELS)
def test_what_peft_trained_on_stacked_experts_merges_as_peft_merges_it(
    name: str, parameters: list[str], form: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    if form == "published":
        model.save_pretrained(tmp_path / "base")
    else:
        save_fused(model, tmp_path / "base")
    peft = randomised(model, parameters, use_rslora=name == "mixtral", rank_pattern={"down_proj": 6})
    peft.save_pretrained(tmp_path / "adapter")
    read = load_peft(tmp_path / "adapter")
    merged = merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = peft.merge_and_unload().state_dict()
    stacked = [module for module, (a, _) in read.factors.items() if a.ndim == 3]
    single = form == "published" and name in FUSED_BY_TRANSFORMERS
    products = sum(2 if single and module.endswith("gate_up_proj") else 1 for module in stacked)
    assert stacked and merged == 4 * products + len(read.factors) - len(stacked)
    found = weights_of(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_written_here_loads_in_peft_as_the_one_it_was_read_from(name: str, tmp_path: Path) -> None:
    options = {"rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {r".*1\.mlp\.experts\.down_proj": 3}}
    peft = randomised(MODELS[name](), EXPERTS, **options)
    peft.save_pretrained(tmp_path / "theirs")
    read = load_peft(tmp_path / "theirs")
    save_peft(read, tmp_path / "ours")
    again = load_peft(tmp_path / "ours")
    assert again.alphas == read.alphas and {len(again.factors)} == {len(read.factors)}
    assert load_file(tmp_path / "ours" / WEIGHTS_FILE).keys() == load_file(tmp_path / "theirs" / WEIGHTS_FILE).keys()
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(peft))


def by_expert(
    model: PreTrainedModel, spelling: tuple[str, str, str], *, rank: int, alpha: float, **settings: Any
) -> PeftAdapter:
    """An adapter on every expert of a model whose experts transformers has stacked, and on an attention linear."""
    torch.manual_seed(2)
    factors, moe = {}, "block_sparse_moe" if spelling[0] == "w1" else "mlp"
    for name, parameter in model.named_parameters():
        if not name.endswith("experts.gate_up_proj"):
            continue
        experts, double, hidden = parameter.shape
        for e in range(experts):
            for product, (out, taken) in zip(
                spelling, [(double // 2, hidden), (double // 2, hidden), (hidden, double // 2)], strict=True
            ):
                key = f"{name.removesuffix('gate_up_proj').replace('.mlp.', f'.{moe}.')}{e}.{product}"
                factors[key] = (torch.randn(rank, taken) / 4, torch.randn(out, rank) / 4)
    attention = model.model.layers[1].self_attn.o_proj
    factors["model.layers.1.self_attn.o_proj"] = (
        torch.randn(5, attention.in_features) / 4,
        torch.randn(attention.out_features, 5) / 4,
    )
    values: dict[str, Any] = {"rank": 5, "alpha": 9.0, "dropout": 0.0, "use_rslora": False, **settings}
    return PeftAdapter(
        factors=factors,
        target_modules=["model.layers.1.self_attn.o_proj", *spelling],
        alphas={module: alpha for module in factors if split_expert(module) and alpha != values["alpha"]},
        **values,
    )


def updated(model: PreTrainedModel, adapter: PeftAdapter, spelling: tuple[str, str, str]) -> PreTrainedModel:
    """The model with the updates added to its weights, written out."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for module, (a, b) in adapter.factors.items():
            factor = scaling(a.shape[0], adapter.alpha_of(module), adapter.use_rslora)
            if not (parts := split_expert(module)):
                params[f"{module}.weight"] += factor * b @ a
                continue
            owner, place = parts[0].replace("block_sparse_moe", "mlp"), spelling.index(parts[2])
            weight = params[f"{owner}.{'down_proj' if place == 2 else 'gate_up_proj'}"][parts[1]]
            rows = weight if place == 2 else weight.chunk(2)[place]
            rows += factor * b @ a
    return model


SPELLINGS = {"qwen3_moe": 0, "deepseek_v3": 0, "mixtral": 1}
NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize(("rank", "alpha"), [(5, 9.0), (3, 9.0), (3, 4.0)], ids=["same", "rank", "rank and alpha"])
@pytest.mark.parametrize("name", FUSED_BY_TRANSFORMERS)
def test_adapters_on_single_experts_load_in_peft_with_their_scaling(
    name: str, rank: int, alpha: float, use_rslora: bool, tmp_path: Path
) -> None:
    spelling = NAMES[SPELLINGS[name]]
    adapter = by_expert(MODELS[name](), spelling, rank=rank, alpha=alpha, use_rslora=use_rslora)
    save_peft(adapter, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert len(config.get("rank_pattern", {})) <= 3 and len(config.get("alpha_pattern", {})) <= 3
    read = load_peft(tmp_path / "ours")
    assert {m: (read.rank_of(m), read.alpha_of(m)) for m in read.factors} == {
        m: (adapter.rank_of(m), adapter.alpha_of(m)) for m in adapter.factors
    }
    expected = logits(updated(MODELS[name](), adapter, spelling))
    assert (expected - logits(MODELS[name]())).abs().max() > 0.1
    model = PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")  # which sorts the tables, and stacks the experts
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    # Read here, and taken apart, it is what was written.
    shapes = {f"{m}.weight": (b.shape[0], a.shape[1]) for m, (a, b) in adapter.factors.items()}
    back = fit_experts(load_peft(tmp_path / "theirs"), shapes, model_type=name)
    assert back.factors.keys() == adapter.factors.keys()
    for module, (a, b) in adapter.factors.items():
        assert torch.equal(back.factors[module][0], a) and torch.equal(back.factors[module][1], b)
        assert back.alpha_of(module) == adapter.alpha_of(module), module


@pytest.mark.parametrize("form", ["published", "fused"])
@pytest.mark.parametrize("name", FUSED_BY_TRANSFORMERS)
def test_adapters_on_single_experts_merge_into_folders_of_either_form(name: str, form: str, tmp_path: Path) -> None:
    spelling = NAMES[SPELLINGS[name]]
    adapter = by_expert(MODELS[name](), spelling, rank=3, alpha=4.0, use_rslora=True)
    save_peft(adapter, tmp_path / "adapter")
    if form == "published":
        MODELS[name]().save_pretrained(tmp_path / "base")
    else:
        save_fused(MODELS[name](), tmp_path / "base")
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = updated(MODELS[name](), adapter, spelling).state_dict()
    found = weights_of(tmp_path / "merged")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_experts_of_layers_with_ranks_of_their_own_load_in_peft(tmp_path: Path) -> None:
    model = MODELS["qwen3_moe"]()
    first = by_expert(model, NAMES[0], rank=3, alpha=4.0)
    second = by_expert(model, NAMES[0], rank=6, alpha=5.0)
    factors = {m: (second if ".1.mlp" in m else first).factors[m] for m in first.factors}
    alphas = {m: 5.0 if ".1.mlp" in m else 4.0 for m in factors if split_expert(m)}
    adapter = replace(first, factors=factors, alphas=alphas)
    save_peft(adapter, tmp_path / "ours")
    read = load_peft(tmp_path / "ours")
    assert {m: (read.rank_of(m), read.alpha_of(m)) for m in factors} == {
        m: (adapter.rank_of(m), adapter.alpha_of(m)) for m in factors
    }
    expected = logits(updated(MODELS["qwen3_moe"](), adapter, NAMES[0]))
    for at in ("ours", "theirs"):
        loaded = PeftModel.from_pretrained(MODELS["qwen3_moe"](), tmp_path / at)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        loaded.save_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("inner", [24, 16, 32], ids=["neither square", "gate and up square", "down square"])
@pytest.mark.parametrize("name", MODELS)
def test_what_an_old_peft_wrote_is_read_the_other_way_round(name: str, inner: int, tmp_path: Path) -> None:
    """Before 0.19 A went over the second dim in every model."""
    model = MODELS[name](inner)
    model.save_pretrained(tmp_path / "base")
    peft = randomised(model, EXPERTS)
    peft.save_pretrained(tmp_path / "adapter")
    if name != "gpt_oss":  # in which it goes there still
        read = load_peft(tmp_path / "adapter")
        turned = {m: (b.mT, a.mT) if a.ndim == 3 else (a, b) for m, (a, b) in read.factors.items()}
        save_peft(replace(read, factors=turned, peft_version="0.18.0"), tmp_path / "old")
    else:
        (tmp_path / "adapter").rename(tmp_path / "old")
        config = json.loads((tmp_path / "old" / CONFIG_FILE).read_text())
        (tmp_path / "old" / CONFIG_FILE).write_text(json.dumps({**config, "peft_version": "0.18.0"}))
    assert load_peft(tmp_path / "old").peft_version == "0.18.0"
    merge_directories(tmp_path / "base", tmp_path / "old", tmp_path / "merged")
    expected, found = peft.merge_and_unload().state_dict(), weights_of(tmp_path / "merged")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
def test_one_square_stack_alone_goes_by_the_version_and_the_kind_of_model(
    name: str, version: str, tmp_path: Path
) -> None:
    model = MODELS[name](16)  # gate and up together are 32 x 32
    model.save_pretrained(tmp_path / "base")
    peft = randomised(model, EXPERTS[:1])
    peft.save_pretrained(tmp_path / "adapter")
    read = load_peft(tmp_path / "adapter")
    if version == "0.18.0" and name != "gpt_oss":
        turned = {m: (b.mT, a.mT) if a.ndim == 3 else (a, b) for m, (a, b) in read.factors.items()}
        read = replace(read, factors=turned)
    save_peft(replace(read, peft_version=version), tmp_path / "adapter_of_version")
    merge_directories(tmp_path / "base", tmp_path / "adapter_of_version", tmp_path / "merged")
    expected, found = peft.merge_and_unload().state_dict(), weights_of(tmp_path / "merged")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_experts_load_beside_dense_layers_and_shared_experts_of_other_ranks(tmp_path: Path) -> None:
    """PEFT would take `gate_proj` and the like of both for routed experts, were they not named by their weights."""
    model = MODELS["deepseek_v3"]()
    routed = by_expert(model, NAMES[0], rank=3, alpha=4.0, use_rslora=True)
    torch.manual_seed(4)
    beside = {
        name: (torch.randn(7, linear.in_features) / 4, torch.randn(linear.out_features, 7) / 4)
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and name.endswith(NAMES[0])
    }
    assert len(beside) == 6
    adapter = replace(
        routed,
        factors={**routed.factors, **beside},
        alphas={**routed.alphas, **dict.fromkeys(beside, 2.0)},
        target_parameters=[f"{name}.weight" for name in beside],
    )
    save_peft(adapter, tmp_path / "ours")
    expected = logits(updated(MODELS["deepseek_v3"](), adapter, NAMES[0]))
    for at in ("ours", "theirs"):
        loaded = PeftModel.from_pretrained(MODELS["deepseek_v3"](), tmp_path / at)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        loaded.save_pretrained(tmp_path / "theirs")
    MODELS["deepseek_v3"]().save_pretrained(tmp_path / "base")
    for at in ("ours", "theirs"):
        merge_directories(tmp_path / "base", tmp_path / at, tmp_path / f"merged {at}")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged {at}", dtype=torch.float32)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_loaders_that_know_experts_as_modules_give_them_their_rank_and_scaling(tmp_path: Path) -> None:
    """As transformers 4 and vLLM do: PEFT itself on a model whose experts are linears."""
    adapter = by_expert(MODELS["qwen3_moe"](), NAMES[0], rank=3, alpha=4.0, use_rslora=True)
    save_peft(adapter, tmp_path / "ours")
    model = torch.nn.Module()
    model.prepare_inputs_for_generation = None  # for task_type = "CAUSAL_LM"
    for module, (a, b) in adapter.factors.items():
        at = model
        for part in module.split(".")[:-1]:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(module.rpartition(".")[2], torch.nn.Linear(a.shape[1], b.shape[0], bias=False))
    loaded = PeftModel.from_pretrained(model, tmp_path / "ours")
    for module, (a, b) in adapter.factors.items():
        linear: Any = loaded.base_model.model.get_submodule(module)
        assert linear.scaling["default"] == pytest.approx(adapter.scaling_of(module), rel=1e-12)
        assert torch.equal(linear.lora_A["default"].weight, a) and torch.equal(linear.lora_B["default"].weight, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_of_stacks_alone_loads_in_peft(name: str, tmp_path: Path) -> None:
    peft = randomised(MODELS[name](), EXPERTS)
    peft.save_pretrained(tmp_path / "theirs")
    read = load_peft(tmp_path / "theirs")
    factors = {module: pair for module, pair in read.factors.items() if pair[0].ndim == 3}
    save_peft(replace(read, factors=factors, target_modules=[]), tmp_path / "ours")
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours")
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "self_attn" in key and "lora_B" in key:
                parameter.zero_()
    assert torch.equal(logits(loaded), logits(peft))


def test_what_gpt_oss_recipes_target_by_layer_is_read(tmp_path: Path) -> None:
    """Before PEFT 0.18 a directory does not say who wrote it."""
    model = MODELS["gpt_oss"](16)
    model.save_pretrained(tmp_path / "base")
    peft = randomised(model, ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"])
    peft.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "peft_version"}))
    assert sum(a.ndim == 3 for a, _ in load_peft(tmp_path / "adapter").factors.values()) == 2
    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected, found = peft.merge_and_unload().state_dict(), weights_of(tmp_path / "merged")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
