"""Adapters of a live model, a plain one and transformers' own: taken out, put in, switched off, merged for good."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hf_tiny import tiny_llama, tiny_qwen3
from peft import PeftModel
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from lora_converter import (
    LoRAConfig,
    LoRALinear,
    adapter_configs,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    split_state_dict,
    unmerge_adapter,
)
from lora_converter.merge import merge_directories
from lora_converter.peft import from_model, into_model, load_peft, save_peft


def plain() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4, bias=False)), torch.randn(5, 6)


def of_transformers(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (make().eval(), torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0)))


MODELS = {
    "gpt2": of_transformers(lambda: tiny_gpt2()),
    "plain": plain,
    "llama": of_transformers(tiny_llama),
    "qwen3": of_transformers(tiny_qwen3),
}


@pytest.fixture(params=list(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """An untouched model, the same with adapters that do something, and an input."""
    base, x = MODELS[request.param]()
    model, _ = MODELS[request.param]()
    apply_lora(model, LoRAConfig(rank=3, alpha=6.0))
    for name, param in adapter_parameters(model).items():
        if "lora_b" in name:
            nn.init.normal_(param, std=0.1)
    return base, model, x


def tiny_gpt2() -> nn.Module:
    """Conv1D: linears whose weights are transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=48, n_layer=2, n_head=4))


def out(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


def test_a_state_dict_carries_a_model_to_another(pair) -> None:
    _, model, x = pair
    state = adapter_state_dict(model)
    assert state.keys() == adapter_parameters(model).keys()
    expected = out(model, x)
    for param in adapter_parameters(model).values():
        nn.init.normal_(param)
    assert not torch.equal(out(model, x), expected)
    load_adapter_state_dict(model, state)  # so the state dict is a copy, too
    assert torch.equal(out(model, x), expected)


def test_a_state_dict_is_split_into_the_adapters_and_the_bases_own(pair) -> None:
    base, model, _ = pair
    adapter, rest = split_state_dict(model.state_dict(), model)
    assert adapter.keys() == adapter_parameters(model).keys()
    assert rest.keys() == base.state_dict().keys()
    base.load_state_dict(rest)


def test_a_base_weight_whose_name_looks_like_an_adapters_stays_the_bases() -> None:
    model = nn.ModuleDict({"lora_a": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    apply_lora(model, LoRAConfig(rank=2, target_modules=["head"]))
    adapter, rest = split_state_dict(model.state_dict(), model)
    assert set(adapter) == {"head.lora_a.weight", "head.lora_b.weight"} and "lora_a.weight" in rest


def test_what_does_not_fit_is_named_and_nothing_is_written(pair) -> None:
    _, model, _ = pair
    state = adapter_state_dict(model)
    first, *_, last = state
    bad = {name: torch.zeros_like(value) for name, value in state.items() if name != first}
    bad[last] = torch.zeros(7, 7)
    bad["elsewhere.lora_a.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_adapter_state_dict(model, bad)
    assert str(error.value) == (
        f"The state dict does not fit the model's adapters. 1 names are missing: {first}. 1 names are no adapter of "
        f"it: elsewhere.lora_a.weight. 1 have another shape: {last} is (7, 7) there and {tuple(state[last].shape)} in "
        "the model."
    )
    assert all(torch.equal(value, state[name]) for name, value in adapter_state_dict(model).items())
    load_adapter_state_dict(model, {**state, "elsewhere.lora_a.weight": torch.zeros(1)}, strict=False)


def test_several_adapters_take_turns_in_one_model_and_cost_their_own_memory_alone() -> None:
    model, x = plain()
    apply_lora(model, LoRAConfig(rank=4))
    params = adapter_parameters(model)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    states, outputs = {}, {}
    for number, name in enumerate(("first", "second")):
        generator = torch.Generator().manual_seed(number)
        for param in params.values():
            param.data.normal_(generator=generator)
        states[name] = {key: value.clone() for key, value in adapter_state_dict(model, full=False).items()}
        outputs[name] = model(x).detach()
    sizes = [sum(v.untyped_storage().nbytes() for v in state.values()) for state in states.values()]
    assert sizes == 2 * [sum(param.nbytes for param in params.values())]
    assert not torch.equal(outputs["first"], outputs["second"])
    for name in ("first", "second", "first"):
        set_adapter(model, states[name])
        assert torch.equal(model(x), outputs[name])
    assert all(new is old for new, old in zip(adapter_parameters(model).values(), params.values(), strict=True))
    wrong = {**states["second"], "2.lora_b.weight": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=r"1 have another shape: 2\.lora_b\.weight is \(1, 4\) there"):
        load_adapter_state_dict(model, wrong)
    assert torch.equal(model(x), outputs["first"])

    model(x).sum().backward()
    optimizer.step()  # what the optimizer holds is still what the model uses, and no longer the state's
    assert not torch.equal(model(x), outputs["first"])
    load_adapter_state_dict(model, states["first"])
    assert torch.equal(model(x), outputs["first"])


def test_without_full_the_values_are_the_parameters_own(pair) -> None:
    _, model, _ = pair
    params = adapter_parameters(model)
    for name, value in adapter_state_dict(model, full=False).items():
        assert value.data_ptr() == params[name].data_ptr() and not value.requires_grad


def test_configs_say_what_each_layer_has(pair) -> None:
    _, model, _ = pair
    configs = adapter_configs(model)
    assert set(configs) == {name.rsplit(".", 2)[0] for name in adapter_parameters(model)}
    assert {(c.rank, c.alpha, c.dropout, c.scaling) for c in configs.values()} == {(3, 6.0, 0.0, 2.0)}


def test_disabled_it_is_the_base_bit_for_bit_and_then_itself_again(pair) -> None:
    base, model, x = pair
    check_disabled(base, model, x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++")
@pytest.mark.parametrize("pair", ["plain", pytest.param("llama", marks=pytest.mark.slow)], indirect=True)
def test_compiled_too_with_a_graph_for_either_state(pair) -> None:
    base, model, x = pair
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("inductor")
    model.compile(backend=graphs)
    base.compile()
    out(model, x)
    enabled = graphs.frame_count
    check_disabled(base, model, x)
    assert graphs.frame_count == 2 * enabled


def check_disabled(base: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    adapted, expected = out(model, x), out(base, x)
    assert (adapted - expected).abs().max() > 1e-3
    for _ in range(2):
        with disable_adapter(model):
            assert torch.equal(out(model, x), expected)
            with disable_adapter(model):
                assert torch.equal(out(model, x), expected)
            assert torch.equal(out(model, x), expected)
        assert torch.equal(out(model, x), adapted)


class Operators(TorchDispatchMode):
    """The operators that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_disabled_it_runs_the_bases_operators_and_no_other(pair) -> None:
    base, model, x = pair
    with Operators() as of_base:
        out(base, x)
    with disable_adapter(model), Operators() as disabled:
        out(model, x)
    assert disabled.names == of_base.names


def test_an_exception_leaves_it_as_the_end_does(pair) -> None:
    _, model, x = pair
    adapted = out(model, x)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(out(model, x), adapted)


def test_merged_for_good_it_is_a_plain_model_with_the_adapters_output(pair) -> None:
    base, model, x = pair
    adapted = out(model, x)
    assert merge_and_unload(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any("lora" in name for module in model.modules() for name in vars(module))
    torch.testing.assert_close(out(model, x), adapted, rtol=1e-5, atol=1e-5)  # one product for two


def test_a_merged_model_can_be_unloaded_and_not_disabled(pair) -> None:
    _, model, x = pair
    merge_adapter(model)
    merged = out(model, x)
    with pytest.raises(ValueError, match=r"adapters are merged, .* unmerge_adapter first"), disable_adapter(model):
        pass
    merge_and_unload(model)
    assert torch.equal(out(model, x), merged) and not any(isinstance(m, LoRALinear) for m in model.modules())


def test_gpt2_goes_to_peft_and_comes_back(tmp_path: Path) -> None:
    """PEFT's fan_in_fan_out; then the merged directory, in plain transformers."""
    model, x = of_transformers(tiny_gpt2)()
    model.save_pretrained(tmp_path / "base")
    config = LoRAConfig(rank=3, alpha=6.0, target_modules=["c_attn", "c_fc", "mlp.c_proj"])
    assert len(apply_lora(model, config)) == 6
    for param in adapter_parameters(model).values():
        nn.init.normal_(param, std=0.1)
    expected = out(model, x)
    save_peft(from_model(model), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_gpt2().eval(), tmp_path / "adapter")
    torch.testing.assert_close(out(theirs, x), expected, rtol=1e-5, atol=1e-5)

    twin, _ = of_transformers(tiny_gpt2)()
    apply_lora(twin, config)
    into_model(load_peft(tmp_path / "adapter"), twin)
    assert torch.equal(out(twin, x), expected)

    merge_directories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(out(merged, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out(merge_and_unload(model), x), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_scaling_is_refused(tmp_path: Path) -> None:
    model, _ = plain()
    apply_lora(model, LoRAConfig(rank=3, alpha=6.0))
    other, _ = plain()
    apply_lora(other, LoRAConfig(rank=3, alpha=7.0))
    with pytest.raises(ValueError, match=r"scaling is 2\.33333, that of 0 2: give apply_lora rank = 3, alpha = 7"):
        into_model(from_model(other), model)


@pytest.mark.parametrize(
    "function",
    [adapter_state_dict, merge_adapter, unmerge_adapter, merge_and_unload, lambda m: disable_adapter(m).__enter__()],
)
def test_a_model_without_adapters_is_told_so(function: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match="The model has no LoRA adapters"):
        function(nn.Sequential(nn.Linear(2, 2)))
