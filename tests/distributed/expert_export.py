"""What the export of adapters on experts takes, counted on two layers of Qwen3-30B-A3B at its own sizes, rank 16.

The weights are on the meta device, only the adapters are there: 128 experts of 2048 x 768, 69 MB a layer in fp32.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from memory import Made, Resident
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.models.qwen3 import Qwen3StateDictAdapter, qwen3_args
from torchtitan.models.qwen3.model.model import Qwen3Model

from lora_converter import adapter_parameters, apply_lora
from lora_converter.run.job import Job, RunConfig
from lora_converter.run.run import Run
from lora_converter.titan.experts import EXPERT_CLASSES

LAYERS, RANK = 2, 16
ARGS = replace(qwen3_args["30B-A3B"], n_layers=LAYERS)
FACTORS = [(size, RANK) for size in (2048, 768) for _ in range(3)]
LARGEST = 4 * 128 * 2048 * RANK
LAYER = 4 * sum(128 * size * rank for size, rank in FACTORS)
NAMES_AND_SHAPES = 1_000_000
"""Bytes that suffice for what the ranks tell each other of the model."""


class Sent(TorchDispatchMode):
    """The bytes that this rank puts into collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        given: Any = ()
        if namespace == "_c10d_functional" and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            given = args[0]
        elif namespace == "c10d" and name not in ("recv_", "barrier"):
            given = args[0] if name == "send" else args[1]
        self.bytes += sum(value.nbytes for value in tree_leaves(given) if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))


def export(folder: Path, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Both layers of a model, on both ranks (`ep`) or a layer on each (`pp`), written as a PEFT directory.

    A rank sends its shards and nothing twice. The first holds the adapter once, in the dtype of the file, and beside it
    what one tensor takes; the other a tensor beyond its shards.
    """
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=(layout,)), dist.get_rank()
    with torch.device("meta"):
        model = Qwen3Model(ARGS)
    apply_lora(model, RunConfig(rank=RANK, target_modules=["experts"]), expert_classes=EXPERT_CLASSES)
    if layout == "pp":
        del model.layers[str(1 - rank)]
    fill(model, mesh if layout == "ep" else None)
    own = [value.to_local() if isinstance(value, DTensor) else value for value in adapter_parameters(model).values()]
    run, path = Run(host(folder, model, mesh, dtype)), folder / "peft"
    resident = Resident()
    with Made(*own) as made, Sent() as sent:
        run.write_peft(str(path))
    held, shards = resident.peak(), sum(value.nbytes for value in own)
    dist.barrier()  # only rank 0 writes, and nobody waits for it
    whole, spare = LAYERS * LAYER * dtype.itemsize // 4, 3 * LARGEST
    from_afar = shards if layout == "ep" or rank else 0
    assert from_afar <= sent.bytes < from_afar + NAMES_AND_SHAPES, (sent.bytes, from_afar)
    beyond = whole if rank == 0 else 0
    assert made.peak <= beyond + spare < beyond + LAYER, (made.peak, whole, shards)
    assert held < beyond + 2 * LAYER, (held, whole)  # the process': with what names and collectives take
    check(path, dtype)
    return {"sent": sent.bytes, "made": made.peak, "resident": held, "file": whole}


def fill(model: nn.Module, mesh: Any) -> None:
    """Gives the adapters values, each expert its own."""
    for fqn, factor in adapter_parameters(model).items():
        module, _, name = fqn.rpartition(".")
        count = len(factor) // mesh.size() if mesh else len(factor)
        first = count * dist.get_rank() if mesh else 0
        part = torch.stack([values(fqn, first + e, tuple(factor.shape[1:])) for e in range(count)])
        whole = DTensor.from_local(part, mesh, [Shard(0)], run_check=False) if mesh else part
        model.get_submodule(module).register_parameter(name, nn.Parameter(whole))


def values(fqn: str, expert: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape).add_(expert + len(fqn)).sin_()


def host(folder: Path, model: nn.Module, mesh: Any, dtype: torch.dtype) -> Any:
    """What `Run` asks of a host for an export."""
    config = RunConfig(rank=RANK, target_modules=["experts"])
    job = Job("qwen3", "30B-A3B", config, seed=0, steps=1, folder=str(folder), exports_peft=True, export_dtype=dtype)
    return SimpleNamespace(
        job=job,
        model_parts=[model],
        meshes={mesh.mesh_dim_names[0]: mesh},
        naming=Qwen3StateDictAdapter(ARGS, None),
        states={},
        optimizers=[],
        lr_schedulers=[],
        data_rank=0,
        on_log=lambda look: None,
    )


def check(path: Path, dtype: torch.dtype) -> None:
    """The file holds all experts of both layers, and each its own values."""
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == LAYERS * 128 * 3 * 2
        for layer in range(LAYERS):
            for expert in (0, 63, 64, 127):
                for hf, weight, letter in (("gate", "w1", "A"), ("down", "w2", "B")):
                    fqn = f"layers.{layer}.moe.experts.{weight}_lora_{letter.lower()}"
                    key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{hf}_proj.lora_{letter}.weight"
                    expected = values(fqn, expert, (2048, RANK)).to(dtype)
                    assert torch.equal(file.get_tensor(key), expected.t() if letter == "A" else expected)
