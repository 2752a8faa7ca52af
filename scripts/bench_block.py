"""The block that bench.py times, and what is compared on it: frozen, our adapters, others' adapters, all weights.

Needs torch and this package alone; PEFT is a peer where it is installed.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora_converter import LoRAConfig, LoRALinear, apply_lora, order
from lora_converter.swap import subclass_with

RANK, ALPHA = 16, 32


class Block(nn.Module):
    """The seven linears of a Llama block with the cheap parts between them; attention is left out.

    x: (tokens, width) -> (tokens, width).
    """

    def __init__(self, width: int, kv_width: int, hidden: int):
        super().__init__()
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_width, bias=False)
        self.wv = nn.Linear(width, kv_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        repeat = self.wq.out_features // self.wk.out_features
        x = x + self.wo(self.wq(h) + (self.wk(h) * self.wv(h)).repeat(1, repeat))
        h = self.norms[1](x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class ScaleOnOutput(LoRALinear):
    """The composition as it is written most often."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.lora_config.scaling * self.lora_b(self.lora_a(x))


def frozen(block: Block) -> nn.Module:
    return block.requires_grad_(False)


def full(block: Block) -> nn.Module:
    return block


def ours(block: Block, *, use_dora: bool = False) -> nn.Module:
    dtype = next(block.norms.parameters()).dtype
    apply_lora(block, LoRAConfig(rank=RANK, alpha=ALPHA, use_dora=use_dora), dtype=dtype)
    for linear in block.modules():
        if isinstance(linear, LoRALinear):
            linear.lora_b.weight.data.normal_(std=0.01)
            linear.keep_of_base()
    return block


def scale_on_output(block: Block) -> nn.Module:
    for linear in ours(block).modules():
        if isinstance(linear, LoRALinear):
            linear.__class__ = subclass_with(ScaleOnOutput, nn.Linear)
    return block


def peft(block: Block, *, use_dora: bool = False) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    dtype = block.wq.weight.dtype
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=False, use_dora=use_dora)
    return inject_adapter_in_model(config, block.requires_grad_(False)).to(dtype)


PEERS: dict[str, Callable[[Block], nn.Module]] = {
    "frozen": frozen,
    "ours": ours,
    "DoRA": functools.partial(ours, use_dora=True),
    "scale on output": scale_on_output,
    **({"PEFT": peft, "PEFT DoRA": functools.partial(peft, use_dora=True)} if importlib.util.find_spec("peft") else {}),
    "full": full,
}


def in_every_order(step: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """Order -> a step of `ours` with its products in that order, whatever the device's is."""

    def forced(wanted: order.Order) -> None:
        with mock.patch.object(order, "order_of", lambda device, dtype: wanted):
            step()

    return {wanted.value: functools.partial(forced, wanted) for wanted in order.Order}


def rank_sized_products(block: Block, tokens: int) -> Callable[[], None]:
    """The six products of every adapter alone, each onto memory that is there: what no implementation goes below.

    Its time is to be compared with an overhead, not with the frozen block's.
    """
    calls = []
    for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
        like = linear.weight.detach()
        x, dy = (
            like.new_empty(tokens, linear.in_features).normal_(),
            like.new_empty(tokens, linear.out_features).normal_(),
        )
        a, b = like.new_empty(RANK, linear.in_features).normal_(), like.new_empty(linear.out_features, RANK).normal_()
        calls.append((x, dy, a, b, x @ a.t(), dy @ b, torch.zeros_like(dy), torch.zeros_like(x)))

    def step() -> None:
        for x, dy, a, b, s, ds, y, dx in calls:
            torch.mm(x, a.t(), out=s)
            y.addmm_(s, b.t())
            torch.mm(dy, b, out=ds)
            dy.t() @ s
            ds.t() @ x
            dx.addmm_(ds, a)

    return step


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: time over the frozen block, per shape and peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = [name for name in PEERS if name != "frozen" and name in results[0]]
    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(results), 4))
    for number, name in enumerate(peers):
        places = [place + number / (len(peers) + 1) for place in range(len(results))]
        axes.bar(places, [result[name] - 1 for result in results], width=1 / (len(peers) + 1), label=name)
    axes.set_xticks(range(len(results)), [f"{r['dtype']}\n{r['width']} x {r['tokens']}" for r in results])
    axes.set_ylabel("time over the frozen block")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
