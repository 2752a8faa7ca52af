"""Bytes of fake tensors: torch's own MemTracker is the reference, as far as it goes."""

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from lora_converter.live_bytes import COMMUNICATION, LiveBytes


class Blocks(nn.Module):
    """Some of them recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = x + (checkpoint(block, x, use_reentrant=False) if number % 2 else block(x))
        return x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_peak_of_a_step_is_that_of_torchs_own_tracker() -> None:
    for rows in (64, 4096):  # the peak is in the optimizer's step, and in the backward
        with FakeTensorMode():
            model, x = Blocks(), torch.empty(rows, 64)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            theirs = MemTracker()
            theirs.track_external(model, optimizer, x)
            with theirs:
                step(model, optimizer, x)
                theirs.reset_mod_stats()
                step(model, optimizer, x)
        with FakeTensorMode():
            model, x = Blocks(), torch.empty(rows, 64)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            ours = LiveBytes("step")
            there = ours.label([*model.parameters(), x], "there")
            with ours:
                step(model, optimizer, x)
                step(model, optimizer, x)
        expected = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        assert sum(ours.peak.values()) == expected and ours.peak["there"] == there


def test_a_storage_lives_as_long_as_its_last_view() -> None:
    with FakeTensorMode(), LiveBytes("here") as live:
        base = torch.empty(100)
        view = base[:10]
        assert live.live["here"] == 400
        del base
        assert live.live["here"] == 400
        del view
        assert live.live["here"] == 0 and live.most["here"] == 400


def test_storages_that_are_emptied_and_filled_again_are_gathered_weights() -> None:
    with FakeTensorMode(), LiveBytes("here") as live:
        gathered = torch.empty(100)
        gathered.untyped_storage().resize_(0)
        assert sum(live.live.values()) == 0
        gathered.untyped_storage().resize_(400)
        assert live.live == {"here": 0, COMMUNICATION: 400}
    assert (
        not hasattr(torch.UntypedStorage.resize_, "__wrapped__") and torch.UntypedStorage.resize_.__name__ == "resize_"
    )
