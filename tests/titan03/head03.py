"""What torchtitan 0.3's own loss does with a frozen head under FSDP2, on two ranks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jobs03
import torch
import torch.distributed as dist
from launch import main

HEAD = jobs03.VOCABULARY * jobs03.DIM + jobs03.DIM
"""Elements of the head and of the norm before it, which FSDP2 has in one group."""


@contextmanager
def collectives_of_fsdp() -> Iterator[Counter[tuple[str, int]]]:
    """Counts (collective, elements that this rank puts in)."""
    counts: Counter[tuple[str, int]] = Counter()

    def counted(name: str) -> Any:
        call = getattr(dist, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            given = kwargs["input"] if "input" in kwargs else args[1]
            counts[name, given.numel()] += 1
            return call(*args, **kwargs)

        return mock.patch.object(dist, name, called)

    with counted("all_gather_single"), counted("reduce_scatter_single"):
        yield counts


def counts_of_a_step(config: Any) -> tuple[Counter[tuple[str, int]], int]:
    """The collectives of one step, and how many elements train."""
    run = jobs03.build(config)
    run.trainer.checkpointer.load()
    batch, labels = next(run.trainer.batch_generator(run.trainer.dataloader))
    step = dict(input_dict=batch, labels=labels, global_valid_tokens=torch.tensor(2 * labels.numel()))
    run.trainer.forward_backward_step(**step)  # FSDP2 is set up at first
    with collectives_of_fsdp() as counts:
        run.trainer.forward_backward_step(**step)
    (model,) = run.trainer.model_parts
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert (model.lm_head.weight.grad is None) is not model.lm_head.weight.requires_grad
    run.trainer.close()
    return counts, trained


def head_is_never_reduced(backend: str) -> Callable[[Path], dict[str, int]]:
    def check(folder: Path) -> dict[str, int]:
        options = dict(parallelism__spmd_backend=backend, training__local_batch_size=4)
        ours, trained = counts_of_a_step(jobs03.config(folder / "ours", **options))
        host, all_weights = counts_of_a_step(jobs03.host_config(folder / "host", **options))
        gathered = [counts["all_gather_single", HEAD // 2] for counts in (ours, host)]
        reduced = [
            sum(size * n for (name, size), n in counts.items() if name == "reduce_scatter_single")
            for counts in (ours, host)
        ]
        assert gathered[0] <= gathered[1] and reduced == [trained, all_weights], (ours, host, trained)
        return {"gathered": gathered[0], "gathered without adapters": gathered[1]}

    return check


CHECKS = {backend: head_is_never_reduced(backend) for backend in jobs03.BACKENDS}

if __name__ == "__main__":
    main(CHECKS, jobs03.start_process_group)
