"""`bench.py packed`: unpacking weights over a copy of as many bytes, and adapters on a packed base over those on bf16.

On a GPU the weights are those of Llama-3-8B, and each turn goes through enough of them that none is left in a cache.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
from bench_block import Block, frozen, ours
from bench_measure import paired, ratio

from lora_converter.packed import PackedFormat
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import pack_linear

LLAMA_8B = (4096, 1024, 14336)
"""Width, width of keys and values, width of the feed-forward."""
SMALL = (512, 128, 1408)
DTYPE = torch.bfloat16


def packed_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per format and shape of weight, then one per format for the block of seven linears."""
    cuda = options.device == "cuda"
    block, tokens = (LLAMA_8B, 8192) if cuda else (SMALL, 512)
    width, kv_width, hidden = block
    shapes = [(width, width), (kv_width, width), (hidden, width), (width, hidden)]
    rows = [
        _unpacking(FORMATS[form], shape, 2**30 if cuda else 0, options)
        for form in ("nf4", "mxfp4", "fp8")
        for shape in shapes
    ]
    return rows + _blocks(block, tokens, options)


def _unpacking(form: PackedFormat, shape: tuple[int, int], at_least: int, options: argparse.Namespace) -> dict:
    """Unpacking in turn with a copy that reads and writes as many bytes, and what is unpacked with the CPU's.

    Args:
        at_least: Bytes of unpacked weights in a turn.
    """
    first = form.pack(torch.randn(shape, dtype=DTYPE, device=options.device) * 0.02)
    count = -(-at_least // (first[..., 0].numel() * form.block * DTYPE.itemsize)) or 1
    weights = [first.clone() for _ in range(count)]
    dense = form.unpack(weights[0], DTYPE)
    if not torch.equal(dense.cpu(), form.unpack(first.cpu(), DTYPE)):
        raise SystemExit(f"packed: {form.name} is unpacked to other values on {options.device} than on a CPU.")
    bytes_moved = first.nbytes + dense.nbytes
    sources = [torch.ones(bytes_moved // 2, dtype=torch.uint8, device=options.device) for _ in range(count)]
    target = torch.empty_like(sources[0])

    def unpack() -> None:
        for weight in weights:
            form.unpack(weight, DTYPE)

    def copy() -> None:
        for source in sources:
            target.copy_(source)

    times = paired({"unpack": unpack, "copy": copy}, options.rounds, options.seconds)
    taken = statistics.median(times["unpack"]) / count
    return {
        "format": form.name,
        "out": shape[0],
        "in": shape[1],
        "us": 1e6 * taken,
        "GB/s": bytes_moved / taken / 1e9,
        "time/copy": ratio(times, "unpack", "copy"),
    }


def _blocks(shape: tuple[int, int, int], tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward + backward of the block with adapters, on bases of each format, over that on bf16; and frozen ones."""
    x = torch.randn(tokens, shape[0], dtype=DTYPE, device=options.device, requires_grad=True)
    dy = torch.randn_like(x).detach()
    first = _block(shape, options.device)
    steps: dict[str, Callable[[], None]] = {}
    for (name, prepare), form in itertools.product(
        {"frozen": frozen, "ours": ours}.items(), ("", "nf4", "mxfp4", "fp8")
    ):
        block = _block(shape, options.device)
        block.load_state_dict(first.state_dict())
        for fqn, linear in list(block.named_modules()) if form else []:
            if isinstance(linear, nn.Linear):
                pack_linear(linear, form=form, fqn=fqn)
        module = prepare(block)
        if options.compile:
            module.compile()
        steps[f"{name} {form or 'bf16'}"] = partial(_step, module, x, dy)
    times = paired(steps, options.rounds, options.seconds)
    return [
        {"block": name, "tokens": tokens, "ms": 1e3 * statistics.median(times[name])}
        | {"time/bf16": ratio(times, name, f"{name.split()[0]} bf16")}
        for name in steps
    ]


def _block(shape: tuple[int, int, int], device: str) -> Block:
    with torch.device(device):
        return Block(*shape).to(DTYPE)


def _step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    x.grad = None
    module.zero_grad()
    module(x).backward(dy)
