"""One job on torchtitan 0.2.2, run by that host's environment: what it made and what it lost, for a test of the other.

python on022.py RESULT FOLDER HF_BASE [--options of torchtitan 0.2.2 ...]
"""

import itertools
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import torch
from batches import SEQ_LEN, global_batch
from harness import Run, adapter_state, build, finish


def feed(run: Run) -> None:
    """The batches of the jobs on 0.3."""

    def batches():  # type: ignore[no-untyped-def]
        for step in itertools.count(run.trainer.step):
            tokens = global_batch(step)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    generate = run.trainer.batch_generator
    run.trainer.batch_generator = lambda _: generate(batches())


def main(result: str, folder: str, base: str, *args: str) -> None:
    """Trains, and saves initial and final adapters, losses and the fingerprint of the base."""
    run = build(
        folder,
        f"--checkpoint.initial_load_path={base}",
        "--checkpoint.initial_load_in_hf",
        "--training.local_batch_size=8",
        f"--training.seq_len={SEQ_LEN}",
        "--optimizer.lr=3e-3",
        "--optimizer.eps=1e-5",
        "--optimizer.weight_decay=0.1",
        "--lr_scheduler.warmup_steps=2",
        *args,
    )
    feed(run)
    begun: dict[str, torch.Tensor] = {}
    load = run.trainer.checkpointer.load

    def load_and_look(step: int = -1) -> bool:
        loaded = load(step)
        begun.update(adapter_state(run))
        return loaded

    run.trainer.checkpointer.load = load_and_look
    finish(run)
    fingerprint = run.trainer.checkpointer.run.model.base_fingerprint
    found = {"begun": begun, "final": adapter_state(run), "losses": run.losses, "fingerprint": fingerprint}
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
