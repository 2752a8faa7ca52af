"""What an adapter costs beside the frozen model, against full fine-tuning, the plain composition and PEFT, in one run.

    python scripts/bench.py layer  --widths 1024 2048 --tokens 1024 2048 --dtypes float32 bfloat16
    python scripts/bench.py step   --flavor bench50m
    python scripts/bench.py memory --flavor bench50m
    python scripts/bench.py comm

    layer   forward + backward of a block of seven linears over the frozen block's (no torchtitan needed)
    step    a whole training step through torchtitan's trainer, one rank: LoRA over full fine-tuning
    memory  peak resident (CPU) or allocated (GPU) memory of such a run above the imports
    comm    collectives of one block under TP + SP and FSDP2, with and without adapters (2 gloo ranks)

Times are ratios taken in turn within one run (A B C A B C ...), medians over the rounds; absolute times on shared
machines mean little. Results go to the screen, and with --json FILE and --picture FILE there.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora_converter import LoRAConfig, LoRALinear, apply_lora

Results = list[dict[str, Any]]

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
        return nn.Linear.forward(self, x) + self.lora_config.scaling * self.lora_b(self.lora_a(x))


def frozen(block: Block) -> nn.Module:
    return block.requires_grad_(False)


def full(block: Block) -> nn.Module:
    return block


def ours(block: Block) -> nn.Module:
    for linear in apply_lora(block, LoRAConfig(rank=RANK, alpha=ALPHA)):
        linear.lora_b.weight.data.normal_(std=0.01)
    return block


def scale_on_output(block: Block) -> nn.Module:
    for linear in apply_lora(block, LoRAConfig(rank=RANK, alpha=ALPHA)):
        linear.lora_b.weight.data.normal_(std=0.01)
        linear.__class__ = ScaleOnOutput
    return block


def peft(block: Block) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    dtype = block.wq.weight.dtype
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=False)
    return inject_adapter_in_model(config, block.requires_grad_(False)).to(dtype)


PEERS: dict[str, Callable[[Block], nn.Module]] = {
    "frozen": frozen,
    "ours": ours,
    "scale on output": scale_on_output,
    **({"PEFT": peft} if importlib.util.find_spec("peft") else {}),
    "full": full,
}


def layer(options: argparse.Namespace) -> Results:
    """Forward + backward of one block, each peer's time over the frozen block's."""
    results = []
    for dtype_name in options.dtypes:
        for width in options.widths:
            for tokens in options.tokens:
                shape = (width, options.kv_width or width // 4, options.hidden or _round(width * 8 / 3, 256))
                found = layer_ratios(shape, tokens, getattr(torch, dtype_name), options)
                results.append({"dtype": dtype_name, "width": width, "hidden": shape[2], "tokens": tokens, **found})
                print(_row(results[-1]), flush=True)
    return results


def layer_ratios(shape: tuple, tokens: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    device = options.device
    x = torch.randn(tokens, shape[0], dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(tokens, shape[0], dtype=dtype, device=device)
    steps, first = {}, Block(*shape).to(device, dtype)
    for name, prepare in PEERS.items():
        block = Block(*shape).to(device, dtype)
        for param, shared in zip(block.parameters(), first.parameters(), strict=True):
            param.data = shared.data  # the same memory for all: where it lies costs or saves a percent
        module = prepare(block)
        if options.compile:
            module.compile()
        steps[name] = _forward_backward(module, x, dy)
    times = paired(steps, options.rounds, device)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["frozen"], strict=True)) for name in times
    }
    found = {"frozen_ms": 1e3 * statistics.median(times["frozen"]), **ratios}
    found["ours/full"] = statistics.median(a / b for a, b in zip(times["ours"], times["full"], strict=True))
    if "PEFT" in times:
        found["overhead ours/PEFT"] = (ratios["ours"] - 1) / (ratios["PEFT"] - 1)
    return found


def _forward_backward(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        for param in module.parameters():
            param.grad = None
        module(x).backward(dy)

    return step


def paired(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns, so that no peer always follows the same one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-2, rounds):  # two rounds to warm up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _round(value: float, to: int) -> int:
    return int(-(-value // to) * to)


def _row(result: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("layer")
    command.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    command.add_argument("--hidden", type=int, help="default: 8/3 of the width")
    command.add_argument("--kv-width", type=int, help="default: a quarter of the width")
    command.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--compile", action="store_true")
    command.set_defaults(run=layer)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
