"""Linears whose factors begin at their weight: what they compute and with how many operators, and where they go."""

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    load_adapter_state_dict,
    merge_adapter,
    reset_adapters,
    unload_adapter,
    unmerge_adapter,
)
from lora_converter.fingerprint import base_fingerprint
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
SMALL = {torch.ops.aten.cat.default: 2, torch.ops.aten.sub.Tensor: 2}


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func] += 1
        return func(*args, **(kwargs or {}))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), Conv1D(12, 16))


def adapted(init: str = "pissa", *, rank: int = 3, moved: float = 0.1) -> nn.Module:
    model = net()
    apply_lora(model, LoRAConfig(rank=rank, alpha=2.0 * rank, init=init))
    for index, param in enumerate(p for p in adapter_parameters(model).values() if p.requires_grad):
        param.data.add_(moved * torch.randn(param.shape, generator=torch.Generator().manual_seed(index)))
    return model


def operators(model: nn.Module) -> Counter:
    with Operators() as mode:
        model(X).sum().backward()
    return mode.found


def test_it_takes_the_operators_of_a_plain_adapter_and_four_small_ones_per_linear_in_the_forward() -> None:
    offset, plain = net()[:1], net()[:1]
    apply_lora(offset, LoRAConfig(rank=3, init="pissa"))
    apply_lora(plain, LoRAConfig(rank=6))
    with torch.no_grad(), Operators() as ours:
        offset(X)
    with torch.no_grad(), Operators() as theirs:
        plain(X)
    assert ours.found - theirs.found == SMALL and theirs.found - ours.found == Counter()
    names = {"mm", "addmm", "linear", "bmm"}
    products = [Counter({op: n for op, n in operators(m).items() if op._opname in names}) for m in (offset, plain)]
    assert products[0] == products[1] != Counter()


def test_the_update_is_the_difference_of_two_products_whichever_way_the_weight_lies() -> None:
    model, base = adapted(), net()
    state = adapter_state_dict(model)
    a, b, a0, b0 = ([state[f"{i}.lora_{name}.weight"] for i in (0, 1)] for name in ("a", "b", "a0", "b0"))
    for index, transposed in ((0, False), (1, True)):
        delta = 2.0 * (b[index] @ a[index] - b0[index] @ a0[index])
        base[index].weight.data += delta.t() if transposed else delta
        # The start is the weight's own best approximation.
        weight = net()[index].weight.detach()
        u, s, vh = torch.linalg.svd(weight.t() if transposed else weight, full_matrices=False)
        torch.testing.assert_close(2.0 * b0[index] @ a0[index], u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(X), base(X), rtol=1e-5, atol=1e-5)
    merge_adapter(model)
    torch.testing.assert_close(model(X), base(X), rtol=1e-5, atol=1e-5)
    unmerge_adapter(model)
    unload_adapter(model)
    assert torch.equal(model(X), net()(X)) and not [n for n in dict(model.named_parameters()) if "lora" in n]


def test_a_state_holds_what_the_factors_began_at() -> None:
    model, other = adapted(), adapted(moved=0.0)
    for name, param in adapter_parameters(other).items():
        param.data.fill_(float("nan") if name.endswith("0.weight") else 0.0)
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(other(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_a_model_without_weights_gets_its_factors_when_they_are_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(24, 16))
    apply_lora(model, LoRAConfig(rank=3, init="olora"))
    model.to_empty(device="cpu")
    model.load_state_dict(net()[:1].state_dict(), strict=False)
    reset_adapters(model, seed=0)
    ready = net()[:1]
    apply_lora(ready, LoRAConfig(rank=3, init="olora"))
    expected, found = adapter_state_dict(ready), adapter_state_dict(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert expected["0.lora_b0.weight"].any()


def test_fingerprints_leave_it_out_and_packages_reach_plain_models() -> None:
    model, plain = adapted(), net()
    assert base_fingerprint(model) == base_fingerprint(plain)
    receiver = IncrementReceiver(plain)
    receiver.receive(pack(model, version=1, base=base_fingerprint(model)))
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_package_in_bf16_loses_nothing_of_a_small_step() -> None:
    model, start, plain, other = adapted(moved=1e-4), net()(X), net(), adapted()
    data = pack(model, version=1, base="it", dtype=torch.bfloat16)
    IncrementReceiver(plain, base="it").receive(data)
    AdapterReceiver(other, base="it").receive(data)
    assert torch.equal(other(X), model(X))
    # fp32's rounding of the sums, of which the step is a thousandth; in bf16 a seventh of it would be lost.
    assert (plain(X) - model(X)).norm() < 1e-2 * (model(X) - start).norm()
