"""Adapters on routed experts in a live model: merged without a whole update anywhere, and sent to other models."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from memory import Made
from test_experts import DIM, EXPERTS, HIDDEN, Block, X, make_block, with_adapters

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from lora_converter.fingerprint import base_fingerprint
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack

MATRIX, WEIGHTS = DIM * HIDDEN, ["moe.experts.w1", "moe.experts.w2", "moe.experts.w3"]
ALL = {"target_modules": ["all-linear", "experts"]}


def test_a_merge_makes_one_experts_matrix_at_a_time() -> None:
    """The sum, what is rounded, and the expert before are alive at once. Kept weights are of the weights' dtype."""
    block = with_adapters(make_block().bfloat16())
    experts = block.moe.experts
    with Made(*block.parameters()) as made:
        experts.check_merge()
    assert made.largest == MATRIX and made.peak <= 5 * 4 * MATRIX
    with Made(*block.parameters()) as made:
        merge_adapter(block)
    kept = 3 * EXPERTS * MATRIX * 2
    assert kept <= made.peak <= kept + 5 * 4 * MATRIX
    with Made(*block.parameters(), *experts.lora_unmerged.values()) as made:
        unmerge_adapter(block)
        merge_and_unload(block)
    assert made.peak <= kept + 5 * 4 * MATRIX


def test_sums_are_rounded_once() -> None:
    block = with_adapters(make_block().bfloat16())
    experts = block.moe.experts
    sums = {
        weight: getattr(experts, weight).float() + torch.cat(list(experts.local_updates(weight)))
        for weight in experts.merged_names()
    }
    merge_adapter(block)
    assert all(torch.equal(getattr(experts, weight), value.bfloat16()) for weight, value in sums.items())


@pytest.mark.parametrize("way", [merge_adapter, merge_and_unload])
def test_a_merge_that_is_not_finite_leaves_the_model_as_it_was(way: Any) -> None:
    block = with_adapters(make_block(), **ALL)
    block.moe.experts.w3_lora_b.data[EXPERTS - 1, 0, 0] = torch.inf
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=r"moe\.experts\.w3 would hold nan or inf in torch\.float32 with its update"):
        way(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert block.moe.experts.is_active and block.wq.is_active


def train(block: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in adapter_parameters(block).values():
        param.data.normal_(std=0.2, generator=generator)


def test_an_adapter_on_experts_leaves_the_fingerprint_of_the_base() -> None:
    assert base_fingerprint(with_adapters(make_block(), **ALL)) == base_fingerprint(make_block())


def test_a_model_with_adapters_gets_the_senders() -> None:
    sender, twin = with_adapters(make_block(), **ALL), with_adapters(make_block(), **ALL)
    train(sender, 3)
    AdapterReceiver(twin).receive(pack(sender, version=0, base=base_fingerprint(sender)))
    assert torch.equal(twin(X), sender(X))
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in adapter_state_dict(sender).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_gets_what_merging_gives_however_often(dtype: torch.dtype) -> None:
    sender, often, once = (make_block().to(dtype) for _ in range(3))
    with_adapters(sender, **ALL)
    base = base_fingerprint(sender)
    receiver = IncrementReceiver(often)
    for version in range(5):
        train(sender, version)
        data = pack(sender, version=version, base=base)
        receiver.receive(data)
    IncrementReceiver(once).receive(data)
    merge_and_unload(sender)
    expected, plain = sender.state_dict(), make_block().to(dtype).state_dict()
    for name, value in often.state_dict().items():
        assert torch.equal(value, expected[name]) and torch.equal(value, once.state_dict()[name])
    assert not any(torch.equal(expected[name], plain[name]) for name in WEIGHTS)


def test_an_increment_makes_one_experts_matrix_at_a_time() -> None:
    sender, model = with_adapters(make_block().bfloat16()), make_block().bfloat16()
    receiver = IncrementReceiver(model, base="b")
    receiver.receive(pack(sender, version=0, base="b"))
    data = pack(sender, version=1, base="b")
    with Made(*model.parameters(), *receiver._originals.values()) as made:
        receiver.receive(data)
    assert made.largest == MATRIX and made.peak <= 5 * 4 * MATRIX + len(data)  # the package's tensors


def test_experts_that_are_no_longer_adapted_get_their_own_weights_back() -> None:
    model = make_block()
    receiver = IncrementReceiver(model, base="b")
    for version, targets in enumerate((["experts"], ["*.experts.w2"])):
        sender = with_adapters(make_block(), target_modules=targets)
        receiver.receive(pack(sender, version=version, base="b"))
    plain = make_block().state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])]
    assert changed == ["moe.experts.w2"]


class Embedding(nn.Module):
    """Names of experts, and no weights of theirs."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.wq, self.moe = nn.Linear(DIM, DIM, bias=False), nn.Module()
        self.moe.experts = nn.ParameterDict(weights)


def plain_experts(block: Block, **others: torch.Tensor) -> nn.Module:
    weights = dict(block.moe.experts.named_parameters())
    return Embedding({name: nn.Parameter(value, requires_grad=False) for name, value in {**weights, **others}.items()})


def test_what_does_not_fit_is_refused_whole() -> None:
    sender = with_adapters(make_block(), target_modules=["wq", "experts"])
    more = make_block()
    linears = nn.Sequential(nn.Linear(DIM, DIM))
    models = {
        rf"w2 is \(5, {DIM}, {HIDDEN}\) in the package and \(4, {DIM}, {HIDDEN}\) in the model": plain_experts(
            more, w2=more.moe.experts.w2[:4]
        ),
        r"w1 is .* in the package and quantized \(torch\.int8\) in the model": plain_experts(
            more, w1=more.moe.experts.w1.to(torch.int8)
        ),
        r"wq\.weight is \(32, 32\) in the package and no linear of that name in the model": linears,
        r"w3 would hold nan or inf with the package's increment": plain_experts(
            more, w3=torch.full_like(more.moe.experts.w3, torch.inf)
        ),
    }
    data = pack(sender, version=0, base="b")
    for message, model in models.items():
        before = copy.deepcopy(model.state_dict())
        receiver = IncrementReceiver(model, base="b")
        with pytest.raises(ValueError, match=message):
            receiver.receive(data)
        assert receiver.version == -1 and not receiver._originals
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    IncrementReceiver(plain_experts(more), base="b").receive(data)
    alone = pack(with_adapters(make_block()), version=0, base="b")
    with pytest.raises(ValueError, match=r"w1 is .* in the package and no experts of that name in the model"):
        IncrementReceiver(linears, base="b").receive(alone)


def test_experts_of_a_receiver_with_other_products_are_named() -> None:
    data = pack(with_adapters(make_block()), version=0, base="b")
    twin = with_adapters(make_block(), target_modules=["*.experts.w1"])
    before = adapter_state_dict(twin)
    with pytest.raises(ValueError, match=r"4 names are no adapter of it: moe\.experts\.w2_lora_a, "):
        AdapterReceiver(twin, base="b").receive(data)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(twin).items())


def test_linears_merge_without_a_second_copy_of_their_update() -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    apply_lora(model, LoRAConfig(rank=2))
    train(model, 0)
    with Made(*model.parameters()) as made:
        model[0].check_merge()
    assert made.largest == 64 * 96 and made.peak <= 3 * 4 * 64 * 96
