"""Routed experts with packed weights are those with what is unpacked, in torchtitan's classes and on both paths."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from lora_converter.titan import install

install()  # before torchtitan

from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts  # noqa: E402
from torchtitan.models.moe.moe import GroupedExperts  # noqa: E402

from lora_converter import (  # noqa: E402
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    unload_adapter,
)
from lora_converter.adapted import has_stacked_experts  # noqa: E402
from lora_converter.experts import expert_shapes, pack_experts  # noqa: E402
from lora_converter.packed_formats import FORMATS  # noqa: E402
from lora_converter.titan.experts import EXPERT_CLASSES  # noqa: E402

EXPERTS, DIM, HIDDEN, COUNTS = 3, 128, 256, [8, 0, 16]
MAKERS: dict[str, Any] = {
    "GroupedExperts": lambda grouped: GroupedExperts(DIM, HIDDEN, EXPERTS, use_grouped_mm=grouped),
    "gpt_oss": lambda grouped: GptOssGroupedExperts(DIM, HIDDEN, EXPERTS, swiglu_limit=7.0, use_grouped_mm=grouped),
}
every_class = pytest.mark.parametrize("which", MAKERS)
both_paths = pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])


class Layer(nn.Module):
    def __init__(self, which: str, *, grouped: bool) -> None:
        super().__init__()
        self.experts = MAKERS[which](grouped)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.experts.parameters():
                param.normal_(std=0.1, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, torch.tensor(COUNTS))


def kind_of(layer: Layer) -> Any:
    return EXPERT_CLASSES[type(layer.experts)]


def plain_pair(which: str, *, grouped: bool, form: str = "nf4") -> tuple[Layer, Layer]:
    """A layer with packed experts and torchtitan's own of their values, frozen."""
    packed = Layer(which, grouped=grouped).requires_grad_(False)
    dense = copy.deepcopy(packed)
    weights, kind = kind_of(packed).expert_weights, kind_of(packed)
    pack_experts(packed.experts, kind, form=form)
    for weight in weights:
        dense.experts.get_parameter(weight).data = FORMATS[form].unpack(
            packed.experts.get_parameter(weight), torch.float32
        )
    return packed, dense


def pair(which: str, *, grouped: bool, form: str = "nf4", targets: str = "experts") -> tuple[Layer, Layer]:
    """The same, with equal adapters."""
    packed, dense = plain_pair(which, grouped=grouped, form=form)
    for layer in (packed, dense):
        config = LoRAConfig(rank=3, target_modules=[targets])
        apply_lora(layer, config, expert_classes=EXPERT_CLASSES)
        generator = torch.Generator().manual_seed(1)
        for param in adapter_parameters(layer).values():
            param.data.normal_(std=0.1, generator=generator)
    return packed, dense


X = torch.randn(sum(COUNTS), DIM, generator=torch.Generator().manual_seed(2))


def out_and_gradients(layer: Layer) -> list[torch.Tensor]:
    x = X.clone().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *adapter_parameters(layer).values()])]


@every_class
@both_paths
def test_without_adapters_they_are_torchtitans_experts_of_the_unpacked_weights(which: str, grouped: bool) -> None:
    packed, dense = plain_pair(which, grouped=grouped)
    assert type(dense.experts) in EXPERT_CLASSES and isinstance(packed.experts, type(dense.experts))
    (out, gradient), (expected, of_dense) = out_and_gradients(packed), out_and_gradients(dense)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    # The grouped path is in bf16, where torchtitan's sums up the gradients of x's casts, one per product.
    assert (gradient - of_dense).norm() < (4e-3 if grouped else 1e-6) * of_dense.norm()


@every_class
@both_paths
@pytest.mark.parametrize("form", FORMATS)
def test_they_are_the_experts_of_the_unpacked_weights(which: str, grouped: bool, form: str) -> None:
    packed, dense = pair(which, grouped=grouped, form=form)
    for found, expected in zip(out_and_gradients(packed), out_and_gradients(dense), strict=True):
        assert torch.equal(found, expected)


@every_class
@both_paths
def test_products_without_adapters_are_packed_ones_too(which: str, grouped: bool) -> None:
    weights = kind_of(Layer(which, grouped=grouped)).expert_weights
    packed, dense = pair(which, grouped=grouped, targets=f"experts.{weights[0]}")
    for found, expected in zip(out_and_gradients(packed), out_and_gradients(dense), strict=True):
        assert torch.equal(found, expected)


@every_class
@both_paths
def test_disabled_they_are_the_packed_experts_alone(which: str, grouped: bool) -> None:
    packed, dense = pair(which, grouped=grouped)
    with torch.no_grad(), disable_adapter(packed), disable_adapter(dense):
        torch.testing.assert_close(packed(X), dense(X), rtol=1e-5, atol=1e-6)
        alone = packed(X)
    assert not torch.allclose(packed(X), alone, atol=1e-2)


@both_paths
def test_nothing_dense_is_saved(grouped: bool) -> None:
    packed, _ = pair("GroupedExperts", grouped=grouped)
    sizes: list[int] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.untyped_storage().nbytes() if value.is_floating_point() else 0)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        packed(X.clone().requires_grad_())
    assert 0 < max(sizes) < 2 * HIDDEN * DIM  # one expert in bf16


def test_their_shapes_are_those_of_the_weights() -> None:
    packed, dense = pair("GroupedExperts", grouped=False)
    assert expert_shapes(packed) == expert_shapes(dense) and has_stacked_experts(packed)
    plain = Layer("GroupedExperts", grouped=False)
    pack_experts(plain.experts, kind_of(plain), form="mxfp4")
    assert expert_shapes(plain, EXPERT_CLASSES)["experts"]["w1"] == (EXPERTS, HIDDEN, DIM)
    assert plain.experts.w1.shape == (EXPERTS, HIDDEN, DIM // 32, 17)
    linear = nn.Sequential(nn.Linear(64, 64))
    assert not has_stacked_experts(linear)


@every_class
@both_paths
def test_merging_into_them_is_refused_and_taking_adapters_off_leaves_them(which: str, grouped: bool) -> None:
    alone, _ = plain_pair(which, grouped=grouped)
    packed, _ = pair(which, grouped=grouped)
    with pytest.raises(ValueError, match=r"experts\.\w+ is packed \(nf4\): an update cannot be merged into it\."):
        merge_adapter(packed)
    unload_adapter(packed)
    assert type(packed.experts) is type(alone.experts) and "weight=nf4" in repr(packed)
    assert packed.experts.state_dict().keys() == alone.experts.state_dict().keys()
    assert torch.equal(packed(X), alone(X))
    apply_lora(packed, LoRAConfig(rank=3, target_modules=["experts"]), expert_classes=EXPERT_CLASSES)
    assert torch.equal(packed(X), alone(X))  # B is zero


def through_pickle(layer: Layer) -> Layer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_class
@pytest.mark.parametrize("way", [through_pickle, copy.deepcopy])
@pytest.mark.parametrize("adapted", [False, True])
def test_they_are_copied_and_pickled(which: str, way: Callable[[Layer], Layer], adapted: bool) -> None:
    layer, _ = pair(which, grouped=False) if adapted else plain_pair(which, grouped=False)
    found = way(layer)
    assert type(found.experts) is type(layer.experts) and torch.equal(found(X), layer(X))


def test_an_adapter_is_the_one_on_the_dense_experts_in_what_it_adds_and_as_a_state_dict() -> None:
    packed, dense = pair("GroupedExperts", grouped=False)
    for weight in packed.experts.expert_weights:
        found, expected = ([*layer.experts.local_updates(weight)] for layer in (packed, dense))
        assert len(found) == EXPERTS and all(map(torch.equal, found, expected))
    state = adapter_state_dict(packed)
    assert state.keys() == adapter_state_dict(dense).keys()
    other, _ = plain_pair("GroupedExperts", grouped=False)
    apply_lora(other, LoRAConfig(rank=3, target_modules=["experts"]), expert_classes=EXPERT_CLASSES)
    load_adapter_state_dict(other, state)
    assert torch.equal(other(X), packed(X))


@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_they_are_the_same(adapted: bool) -> None:
    layer, _ = (pair if adapted else plain_pair)("GroupedExperts", grouped=True)
    expected = out_and_gradients(layer)
    layer.compile(backend="aot_eager")
    for found, value in zip(out_and_gradients(layer), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_is_left_as_it_was() -> None:
    layer = Layer("GroupedExperts", grouped=False)
    layer.experts.w2.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="nan or inf"):
        pack_experts(layer.experts, kind_of(layer), form="nf4")
    assert all(param.dtype is torch.float32 for param in layer.experts.parameters())
