"""Four gloo ranks: two train under FSDP2, two hold a plain model under TP and receive the increments."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from collectives import Collectives
from harness import TINY  # noqa: F401  (registers the tiny flavor)
from launch import main
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchtitan.models.llama3 import Transformer, llama3_args

from lora_converter import LoRAConfig, adapter_parameters, adapter_state_dict, apply_lora, load_adapter_state_dict
from lora_converter.fingerprint import base_fingerprint
from lora_converter.sync import IncrementReceiver, broadcast, pack

TOKENS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
CONFIG = LoRAConfig(rank=4, alpha=8.0)


def base() -> nn.Module:
    torch.manual_seed(0)
    model = Transformer(llama3_args["tiny"])
    with torch.no_grad():
        model.init_weights()
    return model


def sharded_trainer(mesh: DeviceMesh) -> nn.Module:
    model = base()
    apply_lora(model, CONFIG)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    model = base()
    attention = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    feed_forward = {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    rows = {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    for block in model.layers.values():
        parallelize_module(block, mesh, {**attention, **feed_forward, **rows})
    return model


def updates_reach_another_layout(folder: Path) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("role", "part"))
    trains = dist.get_rank() < 2
    model = sharded_trainer(mesh["part"]) if trains else tensor_parallel(mesh["part"])
    receiver = None if trains else IncrementReceiver(model)
    fingerprints: list[str] = [""] * 4
    dist.all_gather_object(fingerprints, base_fingerprint(model))
    assert len(set(fingerprints)) == 1, fingerprints
    figures = {}
    for version in range(3):
        data, seen = None, Collectives()
        if trains:
            generator = torch.Generator().manual_seed(version)
            values = {
                name: torch.randn(param.shape, generator=generator) / 10
                for name, param in sorted(adapter_parameters(model).items())
            }
            load_adapter_state_dict(model, values)
            with seen:
                data = pack(model, version=version, base=fingerprints[0])
            elements = sum(value.numel() for value in values.values())
            gathered = seen.elements("all_gather_into_tensor")
            assert 0 < gathered <= elements, (gathered, elements)  # inputs: this rank's shards
        data = broadcast(data)
        if receiver is not None:
            assert receiver.receive(data) == version
        with torch.no_grad():
            logits = model(TOKENS)
        of_all: list[torch.Tensor] = [torch.empty_like(logits) for _ in range(4)]
        dist.all_gather(of_all, logits)
        # fp32: one product for two, and sums over the tensor-parallel ranks.
        torch.testing.assert_close(of_all[2], of_all[0], rtol=1e-4, atol=1e-4)
        figures[f"bytes of version {version}"] = len(data)
    if receiver is not None:
        once = IncrementReceiver(tensor_parallel(mesh["part"]))
        once.receive(data)
        assert all(
            torch.equal(a.to_local() if hasattr(a, "to_local") else a, b.to_local() if hasattr(b, "to_local") else b)
            for a, b in zip(model.parameters(), once.model.parameters(), strict=True)
        )
    sizes = [sum(value.nbytes for value in adapter_state_dict(model).values()) if trains else 0]
    dist.broadcast_object_list(sizes)
    return {
        **figures,
        "bytes of the adapters": sizes[0],
        "bytes of the base": sum(p.nbytes for p in base().parameters()),
    }


CHECKS = {"updates reach another layout": updates_reach_another_layout}

if __name__ == "__main__":
    main(CHECKS)
