"""What an adapter costs: over the frozen model, against full fine-tuning, the plain composition and PEFT in one run.

    python scripts/bench.py layer    # forward + backward of a block of seven linears; torchtitan is not needed
    python scripts/bench.py step     # a training step through torchtitan's trainer, 53M parameters, one rank
    python scripts/bench.py memory   # the peak of such a run above the imports
    python scripts/bench.py checks   # the base's fingerprint over reading it, a look at the adapters over a step
    python scripts/bench.py comm     # collectives and elements of a step under TP + SP and FSDP2, 2 gloo ranks

Times are ratios taken in turn within one run (A B C, B C A, ...), medians over the rounds: absolute times on shared
machines mean little. --json FILE and --picture FILE keep the results.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
from bench_block import PEERS, Block, in_every_order, rank_sized_products

Results = list[dict[str, Any]]


def layer(options: argparse.Namespace) -> Results:
    """Forward + backward of one block, each peer's time over the frozen block's."""
    results = []
    for dtype_name in options.dtypes:
        for width in options.widths:
            for tokens in options.tokens:
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
    times = paired(steps, options.rounds, device)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["frozen"], strict=True)) for name in times
    }
    found = {"frozen_ms": 1e3 * statistics.median(times["frozen"]), **ratios}
    found["ours/full"] = statistics.median(a / b for a, b in zip(times["ours"], times["full"], strict=True))
    if "PEFT" in times:
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


def step(options: argparse.Namespace) -> Results:
    """A whole training step: data, forward, backward, clipping, AdamW. LoRA over full fine-tuning."""
    from bench_trainer import make_trainer, parameters, trainer_step

    steps = {kind: trainer_step(make_trainer(kind, *options.options)) for kind in ("lora", "full")}
    times = paired(steps, options.rounds, options.device)
    ratio = statistics.median(a / b for a, b in zip(times["lora"], times["full"], strict=True))
    return [{"parameters": parameters(), "lora/full": ratio, "full_ms": 1e3 * statistics.median(times["full"])}]


def memory(options: argparse.Namespace) -> Results:
    """Peak resident (CPU) or allocated (GPU) bytes of three training steps above the imports, each in its process."""
    from bench_trainer import parameters, peak_memory

    peaks = {kind: peak_memory(kind, options.options) for kind in ("lora", "full")}
    ratio = peaks["lora"] / peaks["full"]
    return [{"parameters": parameters(), **{f"{k}_MB": n / 1e6 for k, n in peaks.items()}, "lora/full": ratio}]


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
        times = paired(steps, options.rounds, options.device)
    ratios = {
        f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a, b in (("fingerprint", "read"), ("look", "step"))
    }
    return [{"parameters": parameters(), **ratios, "look_ms": 1e3 * statistics.median(times["look"])}]


def comm(options: argparse.Namespace) -> Results:
    """Collectives of one forward and backward, which checks of tests/distributed/collectives.py count and compare."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "distributed")]
    from hf_models import save_tiny_llama
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


def _row(result: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def _picture(results: Results, path: Path) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["layer", "step", "memory", "checks", "comm"])
    parser.add_argument("--rounds", type=int, default=15, help="of timing (default: 15)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--picture", type=Path, help="file for a bar chart of `layer`")
    block = parser.add_argument_group("layer")
    block.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    block.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    block.add_argument("--hidden", type=int, help="width of the feed-forward (default: 8/3 of the width)")
    block.add_argument("--kv-width", type=int, help="of keys and values (default: a quarter of the width)")
    block.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    block.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    block.add_argument("--compile", action="store_true")
    block.add_argument("--orders", action="store_true", help="our products in every order (lora_converter/order.py)")
    block.add_argument("--threads", type=int, help="of a CPU (default: torch's)")
    parser.add_argument("--options", nargs="*", default=[], help="step, memory: more options of torchtitan")
    return parser


def main() -> None:
    options = _parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.json = options.json and options.json.resolve()  # `step` changes the directory
    results = {"layer": layer, "step": step, "memory": memory, "checks": checks, "comm": comm}[options.part](options)
    where = f"{_device(options.device)}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"\n{options.part}, {where}")
    for result in results:
        print(_row(result))
    if options.json:
        options.json.write_text(
            json.dumps({"part": options.part, "device": where, "results": results}, indent=2) + "\n"
        )
    if options.picture and options.part == "layer":
        _picture(results, options.picture)


if __name__ == "__main__":
    main()
