"""What the messages about factors that begin at the weight say to do, until the trouble is gone."""

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchtitan.models.moe import MoE, MoEArgs

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.adapted import adapted_modules
from lora_converter.experts import experts_of
from lora_converter.hf.changed_base import check_init, check_same_matrix
from lora_converter.hf.naming import HFLinear
from lora_converter.offset import OffsetLinear, initial_factors
from lora_converter.packed_linear import pack_linear
from lora_converter.peft import PeftAdapter, from_model, into_model, load_peft, save_peft
from lora_converter.titan.experts import EXPERT_CLASSES

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(8, 64))


def applied(model: nn.Module, **config: Any) -> nn.Module:
    apply_lora(model, LoRAConfig(**{"rank": 4, "init": "pissa"} | config), expert_classes=EXPERT_CLASSES)
    return model


def test_routed_experts_begin_at_zero() -> None:
    moe = MoE(MoEArgs(num_experts=2, top_k=1, num_shared_experts=1), dim=16, hidden_dim=24)
    assert experts_of(moe, EXPERT_CLASSES)
    targets = ["all-linear", "experts"]
    says = (
        "lora.init = 'pissa': adapters on routed experts begin at zero alone, but experts would get some. Take experts "
        "out of lora.target_modules, or leave lora.init out."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        applied(moe, target_modules=targets)
    applied(copy.deepcopy(moe), target_modules=["all-linear"])
    applied(moe, target_modules=targets, init="")


def test_packed_weights_have_no_factors() -> None:
    packed = net()
    pack_linear(packed[0], form="nf4", fqn="0")
    says = (
        "the factors are those of the weight that is computed with, which is packed or quantized "
        "for 0. Leave lora.base_format out, or leave lora.init out."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        applied(packed)
    assert not [*adapted_modules(packed)]
    applied(packed, init="")
    codes, quantized = net(), net()  # as bitsandbytes' int8, beside which scales stand, and torchao's
    codes[0].weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    quantize_(quantized[:1], IntxWeightOnlyConfig(torch.int8, PerGroup(32)))
    for model in (codes, quantized):
        with pytest.raises(ValueError, match=re.escape(says)):
            applied(model)
        assert not [*adapted_modules(model)]
    applied(net())


def test_a_rank_is_no_higher_than_a_side_of_the_weight() -> None:
    says = (
        "the rank is above the smaller side of 1 (rank 9, at most 8), 2 (rank 9, at most 8). Lower lora.rank, or give "
        "these linears another in lora.rank_pattern."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        applied(net(), rank=9)
    applied(net(), rank=8)
    model = applied(net(), rank=9, rank_pattern={"1": 8, "2": 8})
    assert all(isinstance(module, OffsetLinear) for module in adapted_modules(model))


def test_a_peft_directory_goes_into_plain_adapters(tmp_path: Path) -> None:
    model = applied(net())
    for param in adapter_parameters(model).values():
        if param.requires_grad:
            param.data.add_(0.1)
    save_peft(from_model(model), tmp_path / "adapter")
    adapter = load_peft(tmp_path / "adapter")
    says = (
        "The factors of 0, 1, 2 began at the weight (init), and what they began at is in no PEFT directory. "
        "Load it into adapters without init, of its rank."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        into_model(adapter, applied(net()))
    plain = applied(net(), init="", rank=adapter.rank, alpha=adapter.alpha)
    into_model(adapter, plain)
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)  # fp32 products of another rank


def test_there_is_no_magnitude_of_factors_that_begin_at_the_weight() -> None:
    says = (
        "lora.init = 'pissa' and lora.use_dora = true: factors that begin at the weight have no magnitude here. Leave "
        "lora.init out, or set lora.use_dora = false."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        applied(net(), use_dora=True)
    applied(net(), use_dora=True, init="")
    applied(net(), use_dora=False)


@pytest.mark.parametrize("init", ["PiSSA", "pissa_niter_0", "pissa_niter_", "gaussian", None, True])
def test_another_init_is_refused(init: Any) -> None:
    with pytest.raises(ValueError, match=r"lora\.init = .*: must be '', 'pissa', 'pissa_niter_N'"):
        LoRAConfig(init=init)


def test_what_is_another_matrix_in_the_hosts_model_has_no_factors_of_pefts() -> None:
    half, turned = HFLinear("q", torch.arange(4), None), HFLinear("q", torch.arange(8).flip(0), torch.arange(6).flip(0))
    for linear, init, refused in (
        (half, "pissa", True),
        (half, "", False),
        (turned, "pissa", False),
        (turned, "olora", True),
        (HFLinear("q", turned.rows, None), "olora", False),
    ):
        with pytest.raises(ValueError, match="another matrix in this model") if refused else nullcontext():
            check_same_matrix(linear, init, 8)
    # Of what is not refused, the products are the same in any order; of OLoRA's columns they are not.
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for init, order, same in (("olora", "rows", True), ("olora", "columns", False), ("pissa", "columns", True)):
        config = LoRAConfig(rank=2, init=init)
        other = weight.flip(0 if order == "rows" else 1)
        products = [b @ a for a, b in (initial_factors(each, config, name="q") for each in (weight, other))]
        found = products[1].flip(0 if order == "rows" else 1)
        assert torch.allclose(found, products[0], atol=1e-4) is same


def test_experts_of_a_changed_base_are_refused() -> None:
    a, b = torch.zeros(4, 8), torch.zeros(6, 4)
    expert = PeftAdapter(
        {"model.layers.0.mlp.experts.1.up_proj": (a, b)}, 4, 8.0, 0.0, False, ["up_proj"], init="pissa"
    )
    with pytest.raises(ValueError, match=r"with the routed experts model\.layers\.0\.mlp\.experts\.1\.up_proj"):
        check_init(expert, "it")
    check_init(replace(expert, init=""), "it")
    check_init(replace(expert, factors={"model.layers.0.mlp.up_proj": (a, b)}), "it")
