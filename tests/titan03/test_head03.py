"""torchtitan 0.3's own loss in chunks with a frozen head, which jobs with adapters use as it is: what it costs."""

from pathlib import Path
from typing import Any

import jobs03
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from launch import launch
from memory import Made
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed.utils import set_spmd_backend

from lora_converter.frozen_head import frozen_head_loss

ROWS, LENGTH, WIDTH, VOCABULARY, CHUNKS = 2, 512, 32, 1024, 8
CHUNK = ROWS * LENGTH // CHUNKS * VOCABULARY
"""Elements of a chunk's logits."""


def cost(loss_of: Any, ignored: float) -> tuple[float, int, int, int]:
    """The loss, and of it and its backward: products, the largest tensor, and the most elements alive at once."""
    torch.manual_seed(0)
    head, labels = nn.Linear(WIDTH, VOCABULARY, bias=False), torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    head.requires_grad_(False)
    labels[torch.rand(ROWS, LENGTH) < ignored] = -100
    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    hidden = x * 1.0
    with Made(head.weight, x, hidden, labels) as made:
        loss = loss_of(head, hidden, labels) / (labels != -100).sum()
        loss.backward()
    return loss.item(), made.products // (ROWS * LENGTH * WIDTH), made.largest, made.peak // 4


def torchtitans(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    set_spmd_backend("spmd_types")
    cross_entropy = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)
    chunked = ChunkedLossWrapper.Config(num_chunks=CHUNKS, loss_fn=cross_entropy).build()
    chunked.set_lm_head(head)
    # Divided inside: its backward hands on the gradient that it has made, whatever is done to the loss afterwards.
    trained = (labels != -100).sum()
    return chunked(hidden, labels, trained)[0] * trained


def ours(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return frozen_head_loss(hidden, head.weight, labels, chunk_tokens=ROWS * LENGTH // CHUNKS)


def over_logits(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("ignored", [0.0, 0.8])
def test_torchtitans_loss_makes_no_gradient_of_the_head_and_no_logits_of_all_tokens(ignored: float) -> None:
    """But takes tokens without a label along, and several copies of a chunk's logits, where ours has one."""
    found, own, plain = (cost(loss, ignored) for loss in (torchtitans, ours, over_logits))
    assert found[0] == pytest.approx(plain[0], rel=1e-6) and own[0] == pytest.approx(plain[0], rel=1e-6)
    assert found[1] == plain[1] == 2 * VOCABULARY  # the logits, and the gradient of what goes in; no third
    assert own[1] == pytest.approx(2 * VOCABULARY * (1 - ignored), rel=0.1)
    assert found[2] == CHUNK and own[2] <= CHUNK and plain[2] == CHUNKS * CHUNK
    assert 3 * CHUNK < found[3] < 5 * CHUNK and own[3] < 2 * CHUNK, (found[3] / CHUNK, own[3] / CHUNK)


def test_a_size_of_chunks_is_refused_and_their_number_is_set_instead(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.loss_chunk_tokens = 24: .* set --loss.num_chunks"):
        jobs03.build(jobs03.config(tmp_path, {"loss_chunk_tokens": 24}))
    losses = []
    for number in (8, 4):
        config = jobs03.config(tmp_path / f"{number}", loss__num_chunks=number, training__steps=2)
        run = jobs03.build(config)
        assert run.trainer.loss_fn.num_chunks == number
        losses.append(jobs03.finish(run).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("backend", jobs03.BACKENDS)
def test_under_fsdp2_a_frozen_head_is_gathered_no_more_often_than_a_trained_one_and_never_reduced(
    backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (found,) = launch(
        "../titan03/head03.py", ranks=2, folder=tmp_path_factory.mktemp("head"), checks=[backend]
    ).values()
    assert not found["error"], found["error"]
