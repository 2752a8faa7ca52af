"""Models as other libraries leave them: hooked, wrapped, shared, pickled; and what fails half way."""

import copy
import io
import logging
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    split_state_dict,
    unload_adapter,
    unmerge_adapter,
)
from lora_converter.adapted import adapted_modules
from lora_converter.fingerprint import base_fingerprint
from lora_converter.sync import IncrementReceiver, pack

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
CONFIG = LoRAConfig(rank=2, alpha=4.0)


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, param in enumerate(adapter_parameters(model).values()):
            param.normal_(generator=torch.Generator().manual_seed(number))
    return model


def adapted() -> nn.Module:
    model = make()
    apply_lora(model, CONFIG)
    return fill(model)


# A forward that the class never reaches


def test_accelerates_hooks_are_followed_and_left_as_they_were() -> None:
    expected, model = adapted(), make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    apply_lora(model, CONFIG)
    fill(model)
    assert torch.equal(model(X), expected(X)) and not torch.equal(model(X), make()(X))
    model(X).sum().backward()
    assert all(param.grad is not None for param in adapter_parameters(model).values())
    unload_adapter(model)
    assert torch.equal(model(X), make()(X)) and "_old_forward" in vars(model[0])
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X), make()(X))


def test_any_other_forward_on_the_instance_is_refused_before_anything_changes() -> None:
    model = make()
    model[2][1].forward = lambda x: x
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2\.1 has a forward of its own .*Put adapters on before it is replaced"):
        apply_lora(model, CONFIG)
    assert not list(adapted_modules(model)) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    apply_lora(model, LoRAConfig(rank=2, exclude_modules=["2.1"]))


def test_linears_that_are_never_called_are_left_out_and_refused_when_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ValueError, match=r"the weights of 1\.linear1 \(TransformerEncoderLayer\), .* are read without"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["0", "linear1", "out_proj"]))
    assert not list(adapted_modules(model))
    assert [linear.lora_fqn for linear in apply_lora(model, CONFIG)] == ["0"]
    assert "left out" in caplog.text and "1.self_attn.out_proj (MultiheadAttention)" in caplog.text
    alone = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="an adapter would do nothing"):
        apply_lora(alone, CONFIG)


# Names with wrappers in them


def wrapped(model: nn.Sequential) -> dict[str, nn.Module]:
    inner = make()
    inner[2] = torch.compile(inner[2])
    inner[0] = checkpoint_wrapper(inner[0])
    return {
        "compiled": torch.compile(make()),
        "data parallel": nn.DataParallel(make()),
        "parts": inner,
        "all": torch.compile(nn.DataParallel(inner)),
    }


@pytest.mark.parametrize("how", ["compiled", "data parallel", "parts", "all"])
def test_a_name_is_the_plain_models_everywhere(how: str) -> None:
    plain, model = make(), wrapped(make())[how]
    assert base_fingerprint(model) == base_fingerprint(plain)
    apply_lora(plain, LoRAConfig(rank=2, target_modules=["0", "2.1"]), seed=5)
    apply_lora(model, LoRAConfig(rank=2, target_modules=["0", "2.1"]), seed=5)
    expected, found = adapter_state_dict(plain), adapter_state_dict(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert base_fingerprint(model) == base_fingerprint(plain)
    adapters, rest = split_state_dict(model.state_dict(), model)
    assert adapters.keys() == expected.keys() and len(rest) == len(make().state_dict())
    foreign = {f"module.{name}": value + 1 for name, value in expected.items()}
    load_adapter_state_dict(model, foreign)
    load_adapter_state_dict(plain, {f"_orig_mod.{name}": value + 1 for name, value in expected.items()})
    assert all(map(torch.equal, adapter_state_dict(model).values(), adapter_state_dict(plain).values()))


def test_a_module_of_the_name_module_keeps_it() -> None:
    model = nn.ModuleDict({"module": make()})
    apply_lora(model, CONFIG)
    assert [name for name in adapter_parameters(model) if not name.startswith("module.")] == []
    load_adapter_state_dict(model, adapter_state_dict(model))


# All or nothing


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("way", [merge_adapter, merge_and_unload])
@pytest.mark.parametrize("fault", ["quantized", "not finite", "memory"])
def test_a_merge_that_fails_half_way_leaves_the_model_as_it_was(way, fault: str) -> None:
    model = adapted()
    last = model[2][1]
    broken = mock.patch.object(type(last), "local_updates", autospec=True, side_effect=type(last).local_updates)
    if fault == "quantized":
        last.weight = nn.Parameter(last.weight.to(torch.int8), requires_grad=False)
    elif fault == "not finite":
        last.weight = nn.Parameter(torch.full_like(last.weight, 6e4).half(), requires_grad=False)
        last.lora_b.weight.data.fill_(1e4)
    before = copy.deepcopy(model.state_dict())

    def out_of_memory(linear: nn.Module, name: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    with broken as updates:
        if fault == "memory":
            original = updates.side_effect
            updates.side_effect = lambda linear, name: (out_of_memory if linear is last else original)(linear, name)
        with pytest.raises((ValueError, torch.OutOfMemoryError)):
            way(model)
    assert same(model.state_dict(), before)
    if fault == "memory":
        merge_adapter(model)
        unmerge_adapter(model)
        assert same(model.state_dict(), before)
        merge_and_unload(model)


def test_an_increment_that_does_not_fit_leaves_the_receiver_as_it_was() -> None:
    sender, receiver = adapted(), IncrementReceiver(make().half(), base="it")
    before = copy.deepcopy(receiver.model.state_dict())
    with torch.no_grad():
        sender[2][1].lora_b.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"2\.1\.weight would hold nan or inf with the package's increment"):
        receiver.receive(pack(sender, version=1, base="it"))
    assert same(receiver.model.state_dict(), before) and receiver.version == -1


@pytest.mark.parametrize("features", [(6, 6), (6, 8)])
def test_an_increment_goes_onto_a_conv1d_the_way_its_weight_lies(features: tuple[int, int]) -> None:
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(features[1], features[0]))

    sender, receiver = conv(), IncrementReceiver(conv(), base="it")
    apply_lora(sender, CONFIG)
    fill(sender)
    receiver.receive(pack(sender, version=1, base="it"))
    torch.testing.assert_close(receiver.model(X), sender(X))


# Off, on again, and to disk


def test_adapters_are_taken_off_and_others_put_on() -> None:
    model = adapted()
    merge_adapter(model)
    unload_adapter(model)
    assert same(model.state_dict(), make().state_dict()) and type(model[0]) is nn.Linear
    apply_lora(model, LoRAConfig(rank=5))
    assert model[0].lora_a.weight.shape == (5, 6)
    with pytest.raises(ValueError, match="take them off with unload_adapter"):
        apply_lora(model, CONFIG)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        unload_adapter(make())


def test_an_adapted_model_is_copied_pickled_and_saved(tmp_path: Path) -> None:
    model = adapted()
    expected = model(X)
    torch.save(model, tmp_path / "model.pt")
    stream = io.BytesIO(pickle.dumps(model))
    copies = [copy.deepcopy(model), pickle.load(stream), torch.load(tmp_path / "model.pt", weights_only=False)]
    for again in copies:
        assert torch.equal(again(X), expected) and type(again[0]) is type(model[0])
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in model.parameters()}
        merge_and_unload(again)
        assert type(again[0]) is nn.Linear


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_in_fp32_whatever_the_model_is_in(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    apply_lora(model, CONFIG)
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    assert {param.dtype for param in adapter_parameters(model).values()} == {wanted}
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=2e-5)
    before = adapter_state_dict(model)
    for _ in range(2):
        model(X.to(dtype)).float().square().sum().backward()
        optimizer.step()
    moved = torch.cat([(before[name] != value).flatten() for name, value in adapter_state_dict(model).items()])
    assert moved.float().mean() > 0.95  # in bf16 5 to 9 % of the entries of A would
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} <= {wanted, torch.float32}
