"""A packed linear in a model: the dense one on what is unpacked, alone and under an adapter."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import weight_norm
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    unload_adapter,
)
from lora_converter.adapted import adapted_modules
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import PackedLinear, pack_linear

every_format = pytest.mark.parametrize("form", FORMATS)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 384), nn.SiLU(), nn.Linear(384, 256, bias=False))


def packed(model: nn.Sequential, form: str = "nf4") -> nn.Sequential:
    for name in ("0", "2"):
        pack_linear(model.get_submodule(name), form=form, fqn=name)
    return model


def unpacked(form: str = "nf4") -> nn.Sequential:
    """The dense model of the packed one's values."""
    model = make_model()
    for linear in (model[0], model[2]):
        linear.weight.data = FORMATS[form].unpack(FORMATS[form].pack(linear.weight.data), torch.float32)
    return model


def with_adapters(model: nn.Module, **settings: float) -> nn.Module:
    apply_lora(model, LoRAConfig(rank=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            param.normal_(std=0.1, generator=generator)
    return model


X = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(2))


def out_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = X.clone().requires_grad_()
    out = model(x)
    trained = [param for param in model.parameters() if param.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_format
def test_it_is_the_linear_on_the_unpacked_weight(form: str) -> None:
    model = packed(make_model(), form)
    assert isinstance(model[0], nn.Linear) and (model[0].in_features, model[0].out_features) == (256, 384)
    assert equal(
        out_and_gradients(model.requires_grad_(False)), out_and_gradients(unpacked(form).requires_grad_(False))
    )
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        "0.weight": FORMATS[form].packed_shape((384, 256)),
        "0.bias": (384,),
        "2.weight": FORMATS[form].packed_shape((256, 384)),
    }
    assert f"weight={form}" in repr(model[0])


@every_format
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_on_it_is_one_on_the_unpacked_weight(form: str, dropout: float) -> None:
    model, dense = (with_adapters(m, dropout=dropout) for m in (packed(make_model(), form), unpacked(form)))
    assert {param.dtype for param in adapter_parameters(model).values()} == {torch.float32}
    assert equal(out_and_gradients(model), out_and_gradients(dense))
    with disable_adapter(model), disable_adapter(dense):
        assert torch.equal(model(X), dense(X)) and torch.equal(model(X), unpacked(form)(X))


def test_an_adapter_on_it_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(packed(make_model()))
    monkeypatch.setattr(PackedLinear, "forward", None)
    assert model(X).shape == X.shape


def test_other_dtypes_and_devices_leave_the_bytes_alone() -> None:
    model = with_adapters(packed(make_model()))
    before = model[0].weight.clone()
    model.bfloat16()
    assert torch.equal(model[0].weight, before) and model(X.bfloat16()).dtype is torch.bfloat16


def test_an_adapter_is_taken_off_and_the_packed_linear_is_left() -> None:
    model = packed(make_model())
    expected, cls = model(X), type(model[0])
    unload_adapter(with_adapters(model))
    assert torch.equal(model(X), expected) and type(model[0]) is cls


def test_merging_into_it_is_refused() -> None:
    model = with_adapters(packed(make_model()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight is packed \(nf4\): an update cannot be merged into it\."):
        merge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_is_the_one_on_the_dense_linear_in_what_it_adds_and_as_a_state_dict() -> None:
    model, dense = with_adapters(packed(make_model())), with_adapters(unpacked())
    for found, expected in zip(adapted_modules(model), adapted_modules(dense), strict=True):
        assert all(map(torch.equal, found.local_updates("weight"), expected.local_updates("weight")))
    state = adapter_state_dict(model)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in adapter_state_dict(dense).items()
    }
    other = packed(make_model())
    apply_lora(other, LoRAConfig(rank=4))
    load_adapter_state_dict(other, state)
    assert torch.equal(other(X), model(X))


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [through_pickle, copy.deepcopy])
@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_copied_and_pickled(way: Callable[[nn.Module], nn.Module], adapted: bool) -> None:
    model = packed(make_model())
    model = with_adapters(model) if adapted else model
    found = way(model)
    assert type(found[0]) is type(model[0]) and torch.equal(found(X), model(X))


def test_a_model_on_meta_gets_its_bytes_later() -> None:
    """As a trainer does: packed and adapted without values, then loaded."""
    with torch.device("meta"):
        model = packed(make_model())
        apply_lora(model, LoRAConfig(rank=4))
    model.to_empty(device="cpu")
    for linear in (model[0], model[2]):
        linear.reset_parameters()  # leaves the bytes alone
    loaded = packed(make_model())
    model.load_state_dict(loaded.state_dict(), strict=False)
    with disable_adapter(model):
        assert torch.equal(model(X), loaded(X))


def test_what_cannot_be_packed_is_refused_and_left_as_it_was() -> None:
    narrow = nn.Linear(96, 8)
    with pytest.raises(ValueError, match=r"\(8, 96\) is not made of nf4 blocks of 64 columns"):
        pack_linear(narrow, form="nf4", fqn="narrow")
    diverged = nn.Linear(64, 8)
    diverged.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nan or inf"):
        pack_linear(diverged, form="nf4", fqn="diverged")
    assert type(narrow) is type(diverged) is nn.Linear and diverged.weight.dtype is torch.float32
    float8 = nn.Sequential(nn.Linear(64, 64))
    convert_to_float8_training(float8, config=Float8LinearConfig(emulate=True))
    with pytest.raises(ValueError, match="q is not packed: its class, Float8Linear, has a product of its own"):
        pack_linear(float8[0], form="nf4", fqn="q")
    with pytest.raises(ValueError, match="'int3' is no packed format; the formats are nf4, nf4-fp32, mxfp4, fp8"):
        pack_linear(narrow, form="int3")
    normed = weight_norm(nn.Linear(64, 8))
    with pytest.raises(ValueError, match="normed is not packed: its weight is no parameter"):
        pack_linear(normed, form="nf4", fqn="normed")
    assert not isinstance(normed, PackedLinear) and normed(torch.ones(2, 64)).shape == (2, 8)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_bias_that_trains_gets_its_gradient(adapted: bool) -> None:
    models = [packed(make_model()), unpacked()]
    for model in models:
        model.requires_grad_(False)
        if adapted:
            with_adapters(model)
        model[0].bias.requires_grad_()
    found, expected = map(out_and_gradients, models)
    assert len(found) == len(expected) and len(found) == (7 if adapted else 3)
    for value, other in zip(found, expected, strict=True):
        # fp32; with a bias that trains, the dense one is a composition of plain operations.
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_what_is_no_product_is_refused() -> None:
    """As nn.Linear refuses it; unpacked into integers a weight is zeros."""
    model = packed(make_model())
    with pytest.raises(ValueError, match=r"A product of torch\.int64 inputs with a packed weight in torch\.uint8: "):
        model(X.long())
    model[0].weight.data = model[0].weight.data.bfloat16()
    with pytest.raises(ValueError, match=r"in torch\.bfloat16: .* a packed weight is uint8 and never cast\."):
        model(X)
