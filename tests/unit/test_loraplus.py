"""LoRA+ is no option: its rate of B times λ is `alpha` times λ (docs/which_rank.md). Against PEFT's own optimizer.

Of y = s B A take B = λ B'. Then λ s is the scaling of B' A, and a step of B' is one of B over λ: at LoRA+'s rate λ η of
B, which AdamW's steps follow whatever the size of gradients, B' has A's rate η. Both begin at zero.
"""

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from lora_converter import LoRAConfig, adapter_parameters, apply_lora

RATIO, ALPHA, RANK, RATE, STEPS = 10.0, 4.0, 4, 3e-3, 30
LINEARS = ("0", "2")

Updates = list[torch.Tensor]


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    torch.manual_seed(1)
    parameters = [param for param in model.parameters() if param.requires_grad]
    for _ in range(STEPS):
        x, target = torch.randn(16, 8).double(), torch.randn(16, 4).double()
        F.mse_loss(model(x), target).backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()


def by_alpha(max_norm: float, **options: float) -> tuple[Updates, Updates]:
    """Ours at one rate, with LoRA+'s ratio in `alpha`. Returns the As at the start, and the updates at the end."""
    model = plain_model()
    apply_lora(model, LoRAConfig(rank=RANK, alpha=RATIO * ALPHA), dtype=torch.float64)
    adapters = adapter_parameters(model)
    begun = [adapters[f"{name}.lora_a.weight"].detach().clone() for name in LINEARS]
    train(model, torch.optim.AdamW(adapters.values(), lr=RATE, **options), max_norm)
    factors = [(adapters[f"{name}.lora_b.weight"], adapters[f"{name}.lora_a.weight"]) for name in LINEARS]
    return begun, [(RATIO * ALPHA / RANK * b @ a).detach() for b, a in factors]


def by_peft(begun: Updates, max_norm: float, *, weight_decay: float, eps: float) -> Updates:
    """PEFT's adapters from the same As, at LoRA+'s two rates."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
    model: Any = get_peft_model(plain_model(), config)
    layers = [model.base_model.model.get_submodule(name) for name in LINEARS]
    for layer, a in zip(layers, begun, strict=True):
        layer.lora_A["default"].weight.data.copy_(a)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=weight_decay, eps=eps
    )
    train(model, optimizer, max_norm)
    return [layer.get_delta_weight("default").detach() for layer in layers]


@pytest.mark.parametrize(
    ("max_norm", "weight_decay", "eps", "least", "most"),
    [
        pytest.param(1e9, 0.0, 1e-30, 0.0, 1e-12, id="nothing"),  # fp64's 2e-16, as other orders of sums make of it
        pytest.param(1e9, 0.0, 1e-8, 1e-9, 1e-5, id="eps"),  # beside a gradient of B' that is λ times as large
        pytest.param(0.1, 0.0, 1e-30, 1e-3, 0.2, id="clipping"),  # by a norm in which B's part is λ times as large
        pytest.param(1e9, 0.1, 1e-30, 1e-2, 0.1, id="decay"),  # of B at its own rate, so λ times as much
    ],
)
def test_loraplus_is_alpha_times_its_ratio_but_for(
    max_norm: float, weight_decay: float, eps: float, least: float, most: float
) -> None:
    """What it differs by if nothing is in the way, and under what is: measured 4e-16, 2e-6, 0.08 and 0.04."""
    begun, updates = by_alpha(max_norm, weight_decay=weight_decay, eps=eps)
    expected = by_peft(begun, max_norm, weight_decay=weight_decay, eps=eps)
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(updates, expected, strict=True))
    assert least <= off <= most
