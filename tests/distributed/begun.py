"""What it takes to begin at the base's weights, counted: decompositions over all ranks, and elements sent.

Each rank's decomposition is made to differ, as those of different machines do: so whoever computed one for itself would
have another model.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import build
from launch import main
from parity import FSDP2, PP2, TP2
from tiny_models import base_options

from lora_converter.adapted import adapter_parameters
from lora_converter.offset import initial_factors
from lora_converter.ranks import gather_all
from lora_converter.tensors import full_tensor, local_part

RANK = 4
LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}


def begin(layout: str, folder: Path, bases: Path) -> dict[str, int]:
    """Every module is decomposed by one rank, and its factors are sent once to who shares it, and to nobody else."""
    computed: list[str] = []
    sent: list[int] = []
    broadcast = dist.broadcast

    def noisy(weight: torch.Tensor, config: Any, *, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        computed.append(name)
        return tuple(f * (1 + 0.01 * dist.get_rank()) for f in initial_factors(weight, config, name=name))  # type: ignore[return-value]

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return broadcast(tensor, *args, **kwargs)

    run = build(folder, *base_options("llama3", bases), *LAYOUTS[layout], f"--lora.rank={RANK}", "--lora.init=pissa")
    with (
        mock.patch("lora_converter.run.initial_factors.initial_factors", noisy),
        mock.patch("torch.distributed.broadcast", counted),
    ):
        run.trainer.checkpointer.load()
    modules = run.trainer.checkpointer.run.model.adapted
    everyone = [name for names in gather_all(tuple(computed)) for name in names]
    assert len(everyone) == len({*everyone}) == len(run.trainer.checkpointer.run.model.adapted_fqns())
    if layout == "PP2":
        assert not sent and len(computed) == len(modules)
    else:
        assert abs(2 * len(computed) - len(modules)) <= 1  # the work is shared
        assert sum(sent) == sum(RANK * (m.in_features + m.out_features) for m in modules), "each factor once"
    for part in run.trainer.model_parts:
        for name, param in adapter_parameters(part).items():
            whole = full_tensor(param.detach())
            assert whole.any()
            if layout != "PP2":
                first, second = gather_all(whole.double().sum().item())
                assert first == second, name
            if local_part(param).shape == param.shape and layout == "TP2":  # whole on each rank: nothing was gathered
                first, second = gather_all(local_part(param).detach().double().sum().item())
                assert first == second, name
    run.trainer.close()
    return {"computed": len(computed), "sent": sum(sent)}


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    bases = Path(sys.argv[1]).parent
    main({layout: lambda folder, layout=layout: begin(layout, folder / layout, bases) for layout in LAYOUTS})
