"""`bench.py peers`: one training step of the same model by this package, by transformers + PEFT, and of all weights.

The peers have the same shape, number of tokens, rank, targets, AdamW (foreach), clipping and bf16 autocast; adapters
are fp32 and frozen linears bf16. Each takes one batch again and again, so that no loader is timed. PEFT's loop is the
shortest that does this, without a Trainer. Its base is bf16 as a whole, so its residual stream is too; torchtitan's is
fp32 on one rank.

Each peer has a process of its own. On a CPU all wait side by side, and each takes a step in turn. On a GPU, whose
memory would not hold all and whose times are steady, one ends before the next starts.
"""

import argparse
import functools
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bench_block import ALPHA, RANK
from bench_measure import allocated, paired, ratio, seconds

WARM_UP = 5
DTYPE = torch.bfloat16
Step = Callable[[], None]


@dataclass
class Settings:
    """Of all peers.

    Attributes:
        shape: Of the model, as `bench_trainer.shape` gives it.
        ac: torchtitan's mode of activation checkpointing. "selective" is by op; PEFT's loop then checkpoints layers.
        options: More options of torchtitan.
    """

    flavor: str
    shape: dict[str, int]
    seq_len: int
    batch: int
    ac: str
    device: str
    threads: int | None
    cpu_time: bool
    options: list[str]


def titan(settings: Settings, kind: str, compiled: bool) -> Step:
    """A step of torchtitan's trainer, "lora" or "full", on one batch of its data."""
    from bench_trainer import cut, make_trainer, trainer_step

    cut(settings.flavor, settings.shape["layers"])
    trainer = make_trainer(
        kind,
        f"--model.flavor={settings.flavor}",
        f"--training.seq_len={settings.seq_len}",
        f"--training.local_batch_size={settings.batch}",
        f"--activation_checkpoint.mode={settings.ac}",
        "--activation_checkpoint.selective_ac_option=op",
        *(["--compile.enable"] if compiled else []),
        *settings.options,
    )
    return trainer_step(trainer, itertools.repeat(next(trainer.batch_generator(trainer.dataloader))))


def peft(settings: Settings, compiled: bool) -> Step:
    """A step of transformers and PEFT: a layer is what is checkpointed and what is compiled."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = settings.shape
    config = LlamaConfig(
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=settings.seq_len,
        use_cache=False,
    )
    with torch.device(settings.device):
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
        assert sum(param.numel() for param in base.parameters()) == shape["parameters"]
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)).train()
        ids = torch.randint(shape["vocabulary"], (settings.batch, settings.seq_len))
    if settings.ac != "none":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        for layer in base.model.layers:
            layer.compile()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(settings.device, DTYPE):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()

    return step


PEERS: dict[str, Callable[[Settings], Step]] = {
    "ours": functools.partial(titan, kind="lora", compiled=False),
    "ours compiled": functools.partial(titan, kind="lora", compiled=True),
    "PEFT": functools.partial(peft, compiled=False),
    "PEFT compiled": functools.partial(peft, compiled=True),
    "full": functools.partial(titan, kind="full", compiled=False),
    "full compiled": functools.partial(titan, kind="full", compiled=True),
}


def peer_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per peer: its time, over the first one's too, and the peak of its memory."""
    from bench_trainer import shape

    settings = Settings(
        flavor=options.flavor,
        shape=shape(options.flavor, options.layers),
        seq_len=options.seq_len,
        batch=options.batch,
        ac=options.ac,
        device=options.device,
        threads=options.threads,
        cpu_time=options.cpu_time,
        options=options.options,
    )
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for names in [options.peers] if options.device == "cpu" else [[name] for name in options.peers]:
        with ExitStack() as stack:
            workers = {name: stack.enter_context(_Worker(name, settings)) for name in names}
            peaks |= {name: worker.peak for name, worker in workers.items()}
            times |= paired(workers, options.rounds, _Worker.seconds)
    first, tokens = options.peers[0], options.batch * options.seq_len
    common = {"parameters": settings.shape["parameters"], "tokens": tokens, "ac": options.ac, "dtype": str(DTYPE)[6:]}
    return [
        {
            "peer": name,
            **common,
            "ms": 1e3 * statistics.median(times[name]),
            "tokens/s": tokens / statistics.median(times[name]),
            f"time/{first}": ratio(times, name, first),
            "peak_MB": peaks[name] / 1e6,
        }
        for name in options.peers
    ]


class _Worker:
    """A peer in its process, warm.

    Attributes:
        peak: Bytes of the model, the optimizer and a step.
    """

    def __init__(self, name: str, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings), daemon=True)
        self._process.start()
        theirs.close()
        self.peak: int = self._answer()

    def seconds(self) -> float:
        """Of one more step."""
        self._pipe.send("step")
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"peers: {self._name} has ended; its error is above.") from None

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, name: str, settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with allocated(settings.device) as model:
        step = PEERS[name](settings)
    with allocated(settings.device) as steps:
        for _ in range(WARM_UP):
            step()
    pipe.send(model.left + steps.peak)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(seconds(step, settings.device, settings.cpu_time))


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: tokens per second and the peak of memory, per peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.8 + 0.5 * len(results)), sharey=True)
    for side, quantity, label in zip(axes, ("tokens/s", "peak_MB"), ("tokens per second", "peak, MB"), strict=True):
        bars = side.barh([row["peer"] for row in results], [row[quantity] for row in results])
        side.bar_label(bars, fmt="{:,.0f}", padding=3)
        side.set_xlabel(label)
        side.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
