"""`bench.py experts`: a layer of routed experts with adapters over the same layer frozen, grouped, forward + backward.

What is counted is counted on the meta device at Qwen3-30B-A3B's sizes: nothing is computed for it. What is timed are
those sizes on a GPU, and small ones on a CPU.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bench_measure import paired, ratio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lora_converter.titan import install

install()  # before torchtitan

from torchtitan.models.moe.moe import GroupedExperts, _run_experts_grouped_mm  # noqa: E402

from lora_converter import LoRAConfig, adapter_parameters  # noqa: E402
from lora_converter.experts import add_expert_adapters  # noqa: E402
from lora_converter.titan.experts import LoRAGroupedExperts  # noqa: E402

QWEN3_30B = (128, 2048, 768, 8 * 8192)
"""Experts, width, hidden, rows: 8192 tokens to 8 experts each."""
SMALL = (8, 256, 96, 8 * 256)


def expert_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is counted, and what is timed."""
    found = {name: _counted(step) for name, step in _peers(QWEN3_30B, "meta").items()}
    frozen, ours = found["frozen"], found["ours"]
    shape = QWEN3_30B if options.device == "cuda" else SMALL
    times = paired(_peers(shape, options.device), options.rounds, options.seconds)
    return [
        {**_named(QWEN3_30B), "TFLOP": frozen[0] / 1e12, "ours/frozen": ours[0] / frozen[0]},
        {**_named(QWEN3_30B), "GB_moved": frozen[1] / 1e9, "ours/frozen": ours[1] / frozen[1]},
        {
            **_named(shape),
            "frozen_ms": 1e3 * statistics.median(times["frozen"]),
            "ours/frozen": ratio(times, "ours", "frozen"),
        },
    ]


def _named(shape: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("experts", "width", "hidden", "rows"), shape, strict=True))


def _peers(shape: tuple[int, int, int, int], device: str) -> dict[str, Callable[[], None]]:
    """The steps of both, over the same weights in bf16, with as many rows for each expert."""
    count, width, hidden, rows = shape
    like: dict[str, Any] = dict(dtype=torch.bfloat16, device=device)
    with torch.device(device):
        frozen = GroupedExperts(width, hidden, count, use_grouped_mm=True).bfloat16().requires_grad_(False)
        ours = GroupedExperts(width, hidden, count, use_grouped_mm=True).bfloat16().requires_grad_(False)
    if device != "meta":
        frozen.init_weights(0.02)
        ours.load_state_dict(frozen.state_dict())
    weights = list(LoRAGroupedExperts.expert_weights)
    adapted = add_expert_adapters(ours, LoRAGroupedExperts, LoRAConfig(rank=16), weights=weights, fqn="experts")
    for param in adapter_parameters(adapted).values():
        param.data.normal_(std=0.02)
    x, dy = torch.randn(rows, width, **like).requires_grad_(), torch.randn(rows, width, **like)
    per_expert = torch.full((count,), rows // count, device=device)

    def step(run: Callable[[], torch.Tensor]) -> None:
        x.grad = None
        adapted.zero_grad()
        run().backward(dy)

    return {
        "frozen": lambda: step(lambda: _run_experts_grouped_mm(frozen.w1, frozen.w2, frozen.w3, x, per_expert)),
        "ours": lambda: step(lambda: adapted.grouped(x, per_expert)),
    }


def _counted(step: Callable[[], None]) -> tuple[int, int]:
    """FLOPs of products, and bytes that operators read and write."""
    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _flops_of_grouped_mm})
    with flops, _Moved() as moved:
        step()
    return flops.get_total_flops(), moved.bytes


def _flops_of_grouped_mm(a: Any, b: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of shapes: rows by experts' matrices, or, of a gradient, both sorted by expert; either way each row once."""
    return 2 * math.prod(a) * b[-1]


class _Moved(TorchDispatchMode):
    """Bytes of what each operator takes and gives, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        if not is_view and not func._schema.name.startswith("aten::empty"):
            values = tree_leaves((args, kwargs, result))
            self.bytes += sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
        return result
