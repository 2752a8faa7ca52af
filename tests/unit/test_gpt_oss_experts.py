"""Adapters on gpt_oss's experts, against the same layer in plain PyTorch: one expert after the other, explicit A and B,
gradients by autograd.
"""

from typing import Any

import pytest
import torch
import torch.nn as nn
from test_experts import DIM, EXPERTS, HIDDEN, TOP_K, Operators, X, close, gradients, saved, with_adapters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.models.gpt_oss.model.args import GptOssModelArgs
from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts, GptOssMoE
from torchtitan.models.moe.moe import MoEArgs

from lora_converter import disable_adapter, merge_adapter, merge_and_unload, unmerge_adapter

SCALING, LIMIT = 32 / 3, 2.0
"""A limit that cuts off some of the gates and of the rest."""


class Block(nn.Module):
    """A linear and an MoE layer."""

    def __init__(self, grouped: bool, before: bool):
        super().__init__()
        routing = MoEArgs(
            num_experts=EXPERTS, num_shared_experts=0, top_k=TOP_K, score_before_experts=before, use_grouped_mm=grouped
        )
        self.wq = nn.Linear(DIM, DIM, bias=False)
        self.moe = GptOssMoE(GptOssModelArgs(moe_args=routing, swiglu_limit=LIMIT), DIM, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(self.wq(x))


def make_block(*, grouped: bool = False, before: bool = False) -> Block:
    block = Block(grouped, before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*block.parameters(), block.moe.tokens_per_expert, block.moe.expert_bias):
            value.normal_(std=0.2, generator=generator) if value.ndim > 1 else value.zero_()
    return block


def plain_forward(weights: dict[str, torch.Tensor], x: torch.Tensor, *, before: bool) -> torch.Tensor:
    """The block with `weights` by their names: nothing of torchtitan's and nothing of ours."""

    def mlp(n: int, e: int, x: torch.Tensor) -> torch.Tensor:
        name = f"moe.experts.mlp{n}_weight"
        y = x @ weights[name][e].T + weights[f"moe.experts.mlp{n}_bias"][e]
        if f"{name}_lora_a" in weights:
            y = y + SCALING * (x @ weights[f"{name}_lora_a"][e]) @ weights[f"{name}_lora_b"][e].T
        return y

    def expert(e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = mlp(1, e, x).view(-1, HIDDEN, 2).unbind(-1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return mlp(2, e, gate * torch.sigmoid(1.702 * gate) * (up + 1))

    tokens = (x @ weights["wq.weight"].T).reshape(-1, DIM)
    best, chosen = torch.sigmoid(tokens @ weights["moe.router.gate.weight"].T).topk(TOP_K, dim=1)
    out = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        for rank in range(TOP_K):
            mine = (chosen[:, rank] == e).nonzero().flatten()
            rows, score = tokens[mine], best[mine, rank].unsqueeze(1)
            out = out.index_add(0, mine, expert(e, rows * score) if before else expert(e, rows) * score)
    return x + out.view_as(x)


def results(block: Block) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of all that trains."""
    x = X.clone().requires_grad_()
    out = block(x)
    return {
        "out": out,
        **gradients(out, {"x": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}),
    }


def plain_results(block: Block, *, before: bool) -> dict[str, torch.Tensor]:
    x = X.clone().requires_grad_()
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in block.named_parameters()}
    out = plain_forward(weights, x, before=before)
    return {"out": out, **gradients(out, {"x": x, **{name: p for name, p in weights.items() if p.requires_grad}})}


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not close(found[name], wanted[name], tolerance)]


@pytest.mark.parametrize("before", [True, False], ids=["score before", "score after"])
@pytest.mark.parametrize("targets", [["experts"], ["*.experts.mlp1_weight"], ["moe.experts.mlp2_weight"]])
def test_the_loop_is_the_plain_layer(before: bool, targets: list[str]) -> None:
    block = with_adapters(make_block(before=before), target_modules=targets)
    trained = sum(p.requires_grad for p in block.parameters())
    assert trained == (4 if targets == ["experts"] else 2)
    assert differing(results(block), plain_results(block, before=before), 1e-5) == []


@pytest.mark.parametrize("targets", [["experts"], ["experts.mlp2_weight"]])
def test_grouped_products_are_the_loop_but_for_rounding(targets: list[str]) -> None:
    """bf16 has 8 bits: 4e-3 at each of a few products, and beside the limit a gradient there is or is not."""
    grouped, loop = (with_adapters(make_block(grouped=grouped), target_modules=targets) for grouped in (True, False))
    assert differing(results(grouped), results(loop), 3e-2) == []


def test_what_is_saved_more_is_the_inputs_and_the_small_products() -> None:
    """The frozen layer keeps neither what goes into mlp1 nor what goes into mlp2."""
    rows = X.shape[0] * X.shape[1] * TOP_K
    more = saved(with_adapters(make_block())) - saved(make_block().requires_grad_(False))
    assert more == 4 * (rows * DIM + rows * HIDDEN + 2 * rows * 3)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
def test_no_gradient_of_a_frozen_weight_is_computed(grouped: bool) -> None:
    block = with_adapters(make_block(grouped=grouped))
    out = block(X.clone().requires_grad_())
    with Operators() as seen:
        out.sum().backward()
    products = {shape for name, shape in seen.shapes if name in ("aten::mm", "aten::_grouped_mm", "aten::addmm")}
    full = {(DIM, HIDDEN), (HIDDEN, DIM), (DIM, 2 * HIDDEN), (2 * HIDDEN, DIM)}
    assert products and not products & (full | {(EXPERTS, *shape) for shape in full})


def in_autocast(block: Block, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return block(x)


def in_bf16(block: Block, x: torch.Tensor) -> torch.Tensor:
    block.to(torch.bfloat16)
    return block(x.bfloat16())


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("run", [Block.__call__, in_autocast, in_bf16], ids=["fp32", "autocast", "bf16"])
@torch.no_grad()
def test_before_the_first_step_and_while_disabled_it_is_torchtitans_layer_bit_for_bit(grouped: bool, run: Any) -> None:
    plain = run(make_block(grouped=grouped), X)
    fresh, filled = (with_adapters(make_block(grouped=grouped), fill=fill) for fill in (False, True))
    outs = [run(fresh, X)]
    assert not torch.equal(run(filled, X), plain)
    with disable_adapter(filled):
        outs.append(run(filled, X))
    assert all(out.dtype == plain.dtype and torch.equal(out, plain) for out in outs)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
def test_experts_without_rows_have_gradients_of_zero(grouped: bool) -> None:
    experts = with_adapters(make_block(grouped=grouped)).moe.experts
    x = torch.randn(20, DIM, generator=torch.Generator().manual_seed(0))
    experts(x, torch.tensor([8, 0, 5, 7, 0])).sum().backward()
    for param in experts.adapter_parameters().values():
        assert [bool(grad.any()) for grad in param.grad] == [True, False, True, True, False]
        assert param.grad.isfinite().all()


def test_rows_that_belong_to_no_expert_stay_zero_and_change_nothing() -> None:
    """Expert parallelism pads rows, which the loop sees."""
    experts = with_adapters(make_block()).moe.experts
    counts = torch.tensor([4, 0, 5, 3, 1])
    x = torch.randn(20, DIM, generator=torch.Generator().manual_seed(0))
    out = experts(x, counts)
    assert torch.equal(out[:13], experts(x[:13], counts)) and not out[13:].any()


@torch.no_grad()
def test_the_update_merges_into_the_weights_and_leaves_the_biases() -> None:
    block, plain = with_adapters(make_block()), make_block().state_dict()
    out = block(X)
    merge_adapter(block)
    assert close(block(X), out)
    unmerge_adapter(block)
    assert torch.equal(block(X), out)
    merge_and_unload(block)
    assert close(block(X), out) and type(block.moe.experts) is GptOssGroupedExperts
    after = block.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], after[name])}
    assert after.keys() == plain.keys() and changed == {f"moe.experts.mlp{n}_weight" for n in (1, 2)}


@pytest.mark.parametrize(("axes", "share"), [(("tp",), 1 / 2), (("ep", "etp"), 1)])
@torch.no_grad()
def test_a_rank_of_tp_adds_its_share_of_the_second_bias_as_torchtitan_does(axes: tuple[str, ...], share: float) -> None:
    """Two ranks' outputs are added up, so the second case is torchtitan's mistake: that layout is refused."""
    plain = make_block().moe.experts
    plain.mlp2_bias.normal_()
    bias, counts = plain.mlp2_bias.clone(), torch.ones(EXPERTS, dtype=torch.int64)
    ranks = torch.arange(2).view([1] * (len(axes) - 1) + [2])
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=axes, _init_backend=False, _rank=0)
    adapted = with_adapters(make_block(), fill=False).moe.experts
    for experts in (plain, adapted):
        for name in ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"):
            local = bias if name == "mlp2_bias" else torch.zeros_like(experts.get_parameter(name))
            sharded = DTensor.from_local(local, mesh, run_check=False)
            experts._parameters[name] = nn.Parameter(sharded, requires_grad=False)
        assert torch.equal(experts(torch.zeros(EXPERTS, DIM), counts), bias * share)
