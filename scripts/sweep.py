"""Which rank, which rate? The loss on text that was not trained on, by learning rate, for several ranks and for full
fine-tuning, as in "LoRA Without Regret" (Thinking Machines, 2025, https://thinkingmachines.ai/blog/lora/).

    scripts/demo.sh                       # once: the base, which has read Python, and the C++ text
    .venv/bin/python scripts/sweep.py     # twelve minutes on one idle core

Every run begins at the same base and reads the same batches in the same order: AdamW at a constant rate without decay,
gradients clipped at 1, as torchtitan's trainer has it. `full` trains every weight, `linears` the weights that the
adapters of the other runs stand on. Of each curve the best rate is where a parabola through the lowest point and its
two neighbours, over log(rate), is lowest.

Writes results.json after every run and sweep.png at the end into --output-folder. What results.json has is not run
again: an interrupted sweep goes on, and more --ranks or --rates are added.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer

from lora_converter import LoRAConfig, adapter_configs, adapter_parameters, apply_lora, unload_adapter
from lora_converter.fingerprint import base_fingerprint

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]

LABELS = {"full": "full fine-tuning, all weights", "linears": "full fine-tuning, the adapted linears' weights"}

Curves = dict[str, dict[float, float]]
"""Name of a curve -> learning rate -> loss, nan of a run that diverged."""


def main() -> None:
    options = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(options.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = read_rows(options)
    results = resume(folder / "results.json", settings(options, train, held_out))
    results.setdefault("untouched", mean_loss(load(options), held_out))
    runs = [(f"rank {rank}", rate) for rank in options.ranks for rate in options.rates]
    runs += [(name, rate) for name in ("full", "linears") for rate in options.full_rates]
    done = {(point["curve"], point["rate"]) for point in results["points"]}
    for number, (curve, rate) in enumerate(runs, 1):
        if (curve, rate) in done:
            continue
        began = time.monotonic()
        loss = run(options, curve, rate, train, held_out)
        seconds = round(time.monotonic() - began, 1)
        results["points"].append({"curve": curve, "rate": rate, "loss": loss, "seconds": seconds})
        write(folder / "results.json", results)
        found = "diverged" if loss is None else f"loss {loss:.4f}"
        print(f"{number}/{len(runs)}  {curve} at {rate:g}: {found}, {seconds} s", flush=True)

    curves = read_curves(results["points"])
    draw(curves, results["untouched"], folder / "sweep.png")
    print(f"\nUntouched base: loss {results['untouched']:.3f}\n\n{table(curves)}\n")
    print(f"Wrote {folder}/results.json and {folder}/sweep.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    add("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 5e-3, 1e-2], help="of adapters")
    add("--full-rates", type=float, nargs="+", default=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3], help="of base weights")
    add("--alpha", type=float, default=LoRAConfig().alpha, help="the same for every rank (default: %(default)s)")
    add("--steps", type=int, default=60, help="default: %(default)s")
    add("--rows", type=int, default=4, help="of a step (default: %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens of a row (default: %(default)s)")
    add("--held-out", type=int, default=64, help="rows that are not trained on (default: %(default)s)")
    add("--base", default=str(ROOT / "outputs/demo/base"), help="Hugging Face folder (default: the demo's)")
    add(
        "--text", default=str(ROOT / "outputs/demo/cpp/data.jsonl"), help="JSON lines with a text (default: the demo's)"
    )
    add("--output-folder", default="outputs/sweep", help="default: %(default)s")
    add("--quick", action="store_true", help="ranks 1 and 16, few rates and steps: shows that it runs, no more")
    options = parser.parse_args()
    for path in (options.base, options.text):
        if not Path(path).exists():
            sys.exit(f"{path} is not there; run scripts/demo.sh, which writes it, or give --base and --text.")
    if options.quick:
        options.ranks, options.rates, options.full_rates = [1, 16], [1e-3, 1e-2], [1e-4, 1e-3]
        options.steps, options.held_out = 3, 4
    return options


def read_rows(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents one after the other, cut into rows to train on and rows held out.

    Returns:
        Token ids: (steps, rows, seq_len + 1) and (held_out, seq_len + 1).
    """
    tokenizer = Tokenizer.from_file(str(Path(options.base) / "tokenizer.json"))
    config = json.loads((Path(options.base) / "tokenizer_config.json").read_text())
    begin, end = config["bos_token"], config["eos_token"]
    width, tokens = options.seq_len + 1, list[int]()
    wanted = options.steps * options.rows + options.held_out
    for line in Path(options.text).read_text().splitlines():
        if len(tokens) >= wanted * width:
            break
        tokens += tokenizer.encode(begin + json.loads(line)["text"] + end, add_special_tokens=False).ids
    if len(tokens) < wanted * width:
        sys.exit(
            f"{options.text} has {len(tokens)} tokens of {wanted * width}; take fewer --steps, --rows or --held-out."
        )
    rows = torch.tensor(tokens[: wanted * width]).view(wanted, width)
    held_out, train = rows.split([options.held_out, wanted - options.held_out])
    return train.view(options.steps, options.rows, width), held_out


def settings(options: argparse.Namespace, train: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    """What all runs have in common. A sweep goes on under the same alone."""
    names = ("alpha", "steps", "rows", "seq_len", "held_out")
    digest = hashlib.sha256(train.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()[:16]
    return {
        "base": base_fingerprint(load(options)),
        "tokens": digest,
        **{name: getattr(options, name) for name in names},
    }


def resume(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The results so far, none if there is no file."""
    if not file.exists():
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), **versions}
        return {"settings": wanted, "machine": machine, "points": []}
    results = json.loads(file.read_text())
    other = [name for name in wanted if results["settings"][name] != wanted[name]]
    if other:
        was = ", ".join(f"{name} {results['settings'][name]}, not {wanted[name]}" for name in other)
        sys.exit(f"{file} is of another sweep ({was}); give another --output-folder, or delete it.")
    return results


def write(file: Path, results: dict[str, Any]) -> None:
    """All or nothing: a sweep that is killed here has the file of one point less."""
    file.with_suffix(".tmp").write_text(json.dumps(results, indent=1) + "\n")
    os.replace(file.with_suffix(".tmp"), file)


def load(options: argparse.Namespace) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)


def run(
    options: argparse.Namespace, curve: str, rate: float, train: torch.Tensor, held_out: torch.Tensor
) -> float | None:
    """Trains one model from the base on. Returns its mean loss on the rows held out, nothing if it diverged."""
    model = load(options)
    parameters = trained_parameters(model, curve, options.alpha)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    for batch in train:
        loss = token_loss(model, batch)
        if not loss.isfinite():
            return None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = mean_loss(model, held_out)
    return found if math.isfinite(found) else None


def trained_parameters(model: nn.Module, curve: str, alpha: float) -> list[nn.Parameter]:
    """Those of a curve. `full`: all; `linears`: the weights that an adapter would stand on; `rank R`: adapters."""
    if curve == "full":
        return list(model.parameters())
    rank = LoRAConfig().rank if curve == "linears" else int(curve.removeprefix("rank "))
    apply_lora(model, LoRAConfig(rank=rank, alpha=alpha), seed=0)
    if curve != "linears":
        return list(adapter_parameters(model).values())
    adapted = adapter_configs(model)
    unload_adapter(model)
    weights = [model.get_parameter(f"{name}.weight") for name in adapted]
    for weight in weights:
        weight.requires_grad_()
    return weights


def token_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """rows: (batch, seq_len + 1). In nats per token."""
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, rows: torch.Tensor) -> float:
    return sum(token_loss(model, part).item() * len(part) for part in rows.split(8)) / len(rows)


def read_curves(points: list[dict[str, Any]]) -> Curves:
    """Ranks from the lowest on, then the others, each by rate."""
    curves: Curves = {}
    for point in sorted(points, key=lambda point: (len(point["curve"]), point["curve"], point["rate"])):
        loss = math.nan if point["loss"] is None else point["loss"]
        curves.setdefault(point["curve"], {})[point["rate"]] = loss
    return {name: curves[name] for name in sorted(curves, key=lambda name: name in LABELS)}


def best_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """The rate of the lowest loss, and whether it lies between rates that were tried."""
    rates = sorted(rate for rate in losses if math.isfinite(losses[rate]))
    lowest = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if not 0 < lowest < len(rates) - 1:
        return rates[lowest], rates[lowest] not in (min(losses), max(losses))
    near = rates[lowest - 1 : lowest + 2]
    curvature, slope, _ = numpy.polyfit([math.log(rate) for rate in near], [losses[rate] for rate in near], 2)
    return math.exp(-slope / (2 * curvature)), True


def table(curves: Curves) -> str:
    """In Markdown, a row per curve: its best rate, that over full fine-tuning's, its lowest loss, and all losses."""
    rates = sorted({rate for losses in curves.values() for rate in losses})
    lines = ["| | best rate | over full's | lowest loss | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (4 + len(rates)) + "|")
    full, _ = best_rate(curves["full"])
    for name, losses in curves.items():
        best, inside = best_rate(losses)
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        lowest = min(loss for loss in losses.values() if math.isfinite(loss))
        cells = [f"{best:.2g}{'' if inside else ', at the end'}", f"{best / full:.2g}", f"{lowest:.3f}", *cells]
        lines.append(f"| {name} | {' | '.join(cells).replace('nan', 'diverged')} |")
    return "\n".join(lines)


def draw(curves: Curves, untouched: float, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ranks = max(1, len(curves.keys() - LABELS))
    for number, (name, losses) in enumerate(curves.items()):
        style: dict[str, Any] = {"marker": "o", "color": plt.get_cmap("viridis")(number / ranks)}
        if name in LABELS:
            style = {"marker": "s", "linestyle": "--", "color": "black" if name == "full" else "gray"}
        label = LABELS.get(name, f"LoRA, {name}")
        axes.plot(list(losses), list(losses.values()), label=label, markersize=4, **style)
        axes.axvline(best_rate(losses)[0], color=style["color"], linestyle=":", linewidth=0.8)
    axes.axhline(untouched, color="tab:red", linewidth=0.8, label="untouched base")
    best = min(loss for curve in curves.values() for loss in curve.values() if math.isfinite(loss))
    axes.set(xscale="log", xlabel="learning rate (dotted: the best of each curve)", ylim=(best - 0.1, untouched + 0.3),
             ylabel="loss on text held out (nats per token)")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
