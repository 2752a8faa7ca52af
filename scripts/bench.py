"""What an adapter costs: over the frozen model, against full fine-tuning, the plain composition and PEFT in one run.

    python scripts/bench.py layer    # forward + backward of a block of seven linears; torchtitan is not needed
    python scripts/bench.py step     # a training step through torchtitan's trainer, 53M parameters, one rank
    python scripts/bench.py memory   # the peak of such a run above the imports
    python scripts/bench.py checks   # the base's fingerprint over reading it, a look at the adapters over a step
    python scripts/bench.py comm     # collectives and elements of a step under TP + SP and FSDP2, 2 gloo ranks
    python scripts/bench.py loss     # a frozen head's loss in chunks, over torchtitan's over all logits: time, memory
    python scripts/bench.py experts  # adapted routed experts over frozen ones: FLOPs and bytes counted, and time
    python scripts/bench.py packed   # unpacking NF4, MXFP4 and fp8 over a copy; adapters on a packed base over bf16
    python scripts/bench.py peers    # a training step by this package, by transformers + PEFT, and of all weights

Times are ratios taken in turn within one run (A B C, B C A, ...), medians over the rounds: absolute times on shared
machines mean little, and on a busy one --cpu-time means more. --json FILE and --picture FILE keep the results.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
from bench_block import PEERS, Block, in_every_order, rank_sized_products
from bench_block import picture as picture_of_layer
from bench_loss import loss_rows
from bench_measure import paired, ratio, seconds
from bench_peers import PEERS as TRAINERS
from bench_peers import peer_rows
from bench_peers import picture as picture_of_peers

Results = list[dict[str, Any]]


def layer(options: argparse.Namespace) -> Results:
    """Forward + backward of one block, each peer's time over the frozen block's."""
    results = []
    for dtype_name in options.dtypes:
        for width in options.widths or [1024, 2048]:
            for tokens in options.tokens or [1024, 2048]:
                shape = (width, options.kv_width or width // 4, options.hidden or _round(width * 8 / 3, 256))
                found = layer_ratios(shape, tokens, getattr(torch, dtype_name), options)
                results.append({"dtype": dtype_name, "width": width, "hidden": shape[2], "tokens": tokens, **found})
                print(_row(results[-1]), file=sys.stderr, flush=True)
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
    if options.orders:
        steps |= in_every_order(steps["ours"])
    steps["products alone"] = rank_sized_products(first, tokens)
    times = paired(steps, options.rounds, options.seconds)
    ratios = {name: ratio(times, name, "frozen") for name in times}
    found = {"frozen_ms": 1e3 * statistics.median(times["frozen"]), **ratios}
    found["ours/full"] = ratio(times, "ours", "full")
    found["DoRA/ours"] = ratio(times, "DoRA", "ours")
    if "PEFT" in times:
        found["PEFT DoRA/ours"] = ratio(times, "PEFT DoRA", "ours")
        found["overhead ours/PEFT"] = (ratios["ours"] - 1) / (ratios["PEFT"] - 1)
        found["products alone/PEFT"] = ratios["products alone"] / (ratios["PEFT"] - 1)
    return found


def _forward_backward(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        for param in module.parameters():
            param.grad = None
        module(x).backward(dy)

    return step


def _round(value: float, to: int) -> int:
    return int(-(-value // to) * to)


def step(options: argparse.Namespace) -> Results:
    """A whole training step: data, forward, backward, clipping, AdamW. LoRA over full fine-tuning."""
    from bench_trainer import make_trainer, parameters, trainer_step

    steps = {kind: trainer_step(make_trainer(kind, *options.options)) for kind in ("lora", "full")}
    times = paired(steps, options.rounds, options.seconds)
    full_ms = 1e3 * statistics.median(times["full"])
    return [{"parameters": parameters(), "lora/full": ratio(times, "lora", "full"), "full_ms": full_ms}]


def memory(options: argparse.Namespace) -> Results:
    """Peak resident (CPU) or allocated (GPU) bytes of three training steps above the imports, each in its process."""
    from bench_trainer import parameters, peak_memory

    peaks = {kind: peak_memory(kind, options.options) for kind in ("lora", "full")}
    megabytes = {f"{kind}_MB": peak / 1e6 for kind, peak in peaks.items()}
    return [{"parameters": parameters(), **megabytes, "lora/full": peaks["lora"] / peaks["full"]}]


def checks(options: argparse.Namespace) -> Results:
    """What looking costs: the base's fingerprint over reading the base, a look at the adapters over a step."""
    from bench_trainer import make_trainer, parameters, trainer_step
    from torch.distributed.checkpoint import save

    from lora_converter.dcp.reader import load, read_metadata
    from lora_converter.fingerprint import base_fingerprint

    with tempfile.TemporaryDirectory() as folder:
        enabled = ["--checkpoint.enable", f"--job.dump_folder={folder}", *options.options]
        trainer = make_trainer("lora", *enabled)
        checkpointer, (model,) = trainer.checkpointer, trainer.model_parts
        base = checkpointer.run.model.base.state_dict()
        save(base, checkpoint_id=f"{folder}/base")
        steps = {
            "read": lambda: load(base, f"{folder}/base", read_metadata(f"{folder}/base")),
            "fingerprint": lambda: base_fingerprint(model),
            "step": trainer_step(trainer),
            "look": lambda: checkpointer.run.faults.after_step(2, saves=True),
        }
        times = paired(steps, options.rounds, options.seconds)
    ratios = {f"{a}/{b}": ratio(times, a, b) for a, b in (("fingerprint", "read"), ("look", "step"))}
    return [{"parameters": parameters(), **ratios, "look_ms": 1e3 * statistics.median(times["look"])}]


def comm(options: argparse.Namespace) -> Results:
    """Collectives of one forward and backward, which checks of tests/distributed/collectives.py count and compare."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "distributed")]
    from hf_tiny import save_tiny_llama
    from launch import launch

    tensor_parallel = "llama3: the collectives of a TP model are those without adapters"
    fsdp = "FSDP2 reduces the adapters' gradients alone"
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_llama(Path(folder) / "llama3")
        (Path(folder) / "comm").mkdir()
        found = launch("collectives.py", ranks=2, folder=Path(folder) / "comm", checks=[tensor_parallel, fsdp])
    for name, verdict in found.items():
        if verdict["error"]:
            raise SystemExit(f"{name}: {verdict['error']}")
    return [{"check": name, **verdict["figures"]} for name, verdict in found.items()]


def experts(options: argparse.Namespace) -> Results:
    from bench_experts import expert_rows

    return expert_rows(options)


def packed(options: argparse.Namespace) -> Results:
    from bench_packed import packed_rows

    return packed_rows(options)


def _row(result: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def _device(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, PYTORCH_ALLOC_CONF {os.environ.get('PYTORCH_ALLOC_CONF', 'unset')}"
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> str:
    packages = [name for name in ("torch", "torchtitan", "transformers", "peft") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, help="of timing (default: 15; peers: 8)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--picture", type=Path, help="file for a bar chart of `layer` or `peers`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, in place of wall time")
    parser.add_argument("--options", nargs="*", default=[], help="step, memory, peers: more options of torchtitan")
    block = parser.add_argument_group("layer and loss")
    block.add_argument("--widths", type=int, nargs="+", help="default: 1024 2048; loss: 1024")
    block.add_argument("--tokens", type=int, nargs="+", help="default: 1024 2048; loss: 2048")
    block.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    block.add_argument("--hidden", type=int, help="width of the feed-forward (default: 8/3 of the width)")
    block.add_argument("--kv-width", type=int, help="of keys and values (default: a quarter of the width)")
    block.add_argument("--compile", action="store_true", help="the block, of `layer` and `packed`")
    block.add_argument("--orders", action="store_true", help="our products in every order (lora_converter/order.py)")
    block.add_argument("--vocabulary", type=int, default=32768, help="of the loss")
    block.add_argument("--chunk-tokens", type=int, help="of our loss (default: as in a job)")
    peers = parser.add_argument_group("peers")
    peers.add_argument("--peers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS), metavar="PEER")
    peers.add_argument("--flavor", default="bench", help="of torchtitan's llama3 (default: 53M parameters)")
    peers.add_argument("--layers", type=int, help="of the model (default: all)")
    peers.add_argument("--seq-len", type=int, default=256)
    peers.add_argument("--batch", type=int, default=2)
    peers.add_argument("--ac", default="full", choices=["none", "selective", "full"])
    return parser


PARTS: dict[str, Callable[[argparse.Namespace], Results]] = {
    "layer": layer,
    "step": step,
    "memory": memory,
    "checks": checks,
    "comm": comm,
    "loss": loss_rows,
    "experts": experts,
    "packed": packed,
    "peers": peer_rows,
}


def main() -> None:
    options = _parser().parse_args()
    options.rounds = options.rounds or (8 if options.part == "peers" else 15)
    options.seconds = functools.partial(seconds, device=options.device, cpu_time=options.cpu_time)
    options.threads = 1 if options.cpu_time else options.threads
    if options.threads:
        torch.set_num_threads(options.threads)
    options.json = options.json and options.json.resolve()  # `step` changes the directory
    results = PARTS[options.part](options)
    where = f"{_device(options.device)}, {_versions()}, Python {platform.python_version()}"
    where += ", CPU time" if options.cpu_time else ""
    print(f"\n{options.part}, {where}")
    for result in results:
        print(_row(result))
    if options.json:
        options.json.write_text(
            json.dumps({"part": options.part, "device": where, "results": results}, indent=2) + "\n"
        )
    draw = {"layer": picture_of_layer, "peers": picture_of_peers}.get(options.part)
    if options.picture and draw:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
