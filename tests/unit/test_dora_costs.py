"""What a magnitude costs beside plain factors, counted: operators, elements moved, what is saved, graphs."""

import shutil
from collections import Counter

import pytest
import torch
import torch.nn as nn
from memory import Made
from test_ops import Products
from torch._dynamo.testing import CompileCounterWithBackend

from lora_converter import LoRAConfig, apply_lora
from lora_converter.adapted import adapted_modules
from lora_converter.dora import DoRALinear

IN, OUT, TOKENS, RANK = 48, 64, 256, 4


def layer(*, use_dora: bool, keeps: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    apply_lora(model, LoRAConfig(rank=RANK, target_modules=["0"], use_dora=use_dora))
    for module in adapted_modules(model):
        nn.init.normal_(module.lora_b.weight, std=0.1)
        if keeps:
            module.keep_of_base()
    return model


def step(model: nn.Module) -> list[torch.Tensor]:
    """Output and gradients of one forward and backward."""
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_it_moves_ten_outputs_and_reads_the_weight_once_more() -> None:
    """z ∘ c: three in the forward; dz, dy ∘ z and its sum: seven. Beside that what is of a row's or the rank's size,
    and W Aᵀ; without kept norms the weight is read twice. PEFT's own makes and moves a weight per forward."""
    moved = {}
    for name, options in {"plain": {}, "dora": {"use_dora": True, "keeps": True}, "each": {"use_dora": True}}.items():
        model = layer(**{"use_dora": False, **options})
        with Products() as products:
            step(model)
        moved[name] = products.moved
    small = (IN + OUT) * RANK
    over = moved["dora"] - moved["plain"]
    assert 10 * TOKENS * OUT + IN * OUT < over < 10 * TOKENS * OUT + IN * OUT + 12 * small + 30 * OUT, over
    assert IN * OUT <= moved["each"] - moved["dora"] <= IN * OUT + 10 * OUT


def test_kept_norms_give_every_bit_of_those_of_each_forward() -> None:
    for kept, each in zip(*(step(layer(use_dora=True, keeps=keeps)) for keeps in (True, False)), strict=True):
        assert torch.equal(kept, each)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++")
@pytest.mark.parametrize("keeps", [False, True])
def test_compiled_it_is_the_same_in_one_graph(keeps: bool) -> None:
    expected = step(layer(use_dora=True, keeps=keeps))
    torch._dynamo.reset()
    model, graphs = layer(use_dora=True, keeps=keeps), CompileCounterWithBackend("inductor")
    model.compile(backend=graphs, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        found = step(model)
    assert graphs.frame_count == 1
    for value, own in zip(found, expected, strict=True):  # fp32, sums in another order
        torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


def test_a_plain_adapter_has_its_own_class_and_a_magnitude_saves_one_result_more() -> None:
    """Tokens x outputs once, and rank- or row-sized tensors; no weight-sized one."""
    saved: dict[bool, list[int]] = {}
    for use_dora in (False, True):
        model, kept = layer(use_dora=use_dora), []
        assert isinstance(model[0], DoRALinear) is use_dora
        x = torch.randn(TOKENS, IN, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            model(x)
        saved[use_dora] = kept
    more = sorted((Counter(saved[True]) - Counter(saved[False])).elements())
    assert more[-1] == TOKENS * OUT and all(size <= OUT for size in more[:-1]), more
    assert not Counter(saved[False]) - Counter(saved[True])


def test_no_product_has_the_size_of_b_a() -> None:
    """What operators of forward and backward make, and is not the weight itself."""
    model = layer(use_dora=True)
    with Made(model[0].weight) as made:
        model(torch.randn(3, IN)).sum().backward()
    assert made.largest == max(OUT, IN) * RANK
