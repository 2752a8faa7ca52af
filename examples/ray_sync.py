"""A rollout actor follows a group of training actors: only adapters travel, through Ray's object store.

    .venv/bin/python examples/ray_sync.py        # needs the `ray` extra; CPU, one machine

Two actors train a model under FSDP2; one holds a plain copy of the base and adds the increments it is sent. After each
update both give the same logits.
"""

import socket

import ray
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.fingerprint import base_fingerprint
from lora_converter.sync import IncrementReceiver, pack

WIDTH, LAYERS, RANKS, UPDATES = 256, 4, 2, 3


def make_base() -> nn.Module:
    """Stands for loading a checkpoint: the same weights in every actor."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def probe() -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


@ray.remote(num_cpus=0)
class Trainer:
    """One rank of the training group."""

    def __init__(self, rank: int, port: int):
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
        self.model = make_base()
        apply_lora(self.model, LoRAConfig(rank=8, alpha=16.0))
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.base = base_fingerprint(self.model)
        self.optimizer = torch.optim.AdamW(adapter_parameters(self.model).values(), lr=1e-2)

    def update(self, version: int) -> tuple[bytes, torch.Tensor]:
        """A few steps, then a package and this rank's logits."""
        torch.manual_seed(version * RANKS + dist.get_rank())
        for _ in range(3):
            x = torch.randn(16, WIDTH)
            (self.model(x) - x.flip(-1)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        with torch.no_grad():
            logits = self.model(probe())
        return pack(self.model, version=version, base=self.base), logits


@ray.remote(num_cpus=0)
class Rollout:
    """A plain model, without adapters, that is sent increments."""

    def __init__(self):
        self.model = make_base()
        self.receiver = IncrementReceiver(self.model)

    @torch.no_grad()
    def logits(self, package: bytes) -> torch.Tensor:
        self.receiver.receive(package)
        return self.model(probe())


def main() -> None:
    ray.init(include_dashboard=False, logging_level="ERROR")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    trainers = [Trainer.remote(rank, port) for rank in range(RANKS)]
    rollout = Rollout.remote()
    base = sum(param.nbytes for param in make_base().parameters())
    for version in range(UPDATES):
        package, expected = ray.get([trainer.update.remote(version) for trainer in trainers])[0]
        difference = (ray.get(rollout.logits.remote(package)) - expected).abs().max().item()
        print(
            f"update {version}: {len(package):,} bytes instead of {base:,}, logits differ by {difference:.1e}",
            flush=True,
        )
        assert difference < 1e-4 * expected.abs().max().item()
    ray.shutdown()


if __name__ == "__main__":
    main()
