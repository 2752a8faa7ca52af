"""Adapters on routed experts, against the same MoE layer in plain PyTorch: one expert after the other, explicit A and
B, gradients by autograd.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_converter.titan import install

install()  # before torchtitan

from torchtitan.models.moe.moe import GroupedExperts, MoE, MoEArgs  # noqa: E402

from lora_converter import (  # noqa: E402
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    unload_adapter,
    unmerge_adapter,
)
from lora_converter.adapted import adapted_modules  # noqa: E402
from lora_converter.adapters import configs_of, reset_adapters  # noqa: E402
from lora_converter.grouped import grouped_linear  # noqa: E402
from lora_converter.peft import from_model  # noqa: E402
from lora_converter.targets import select_targets  # noqa: E402
from lora_converter.titan.experts import EXPERT_CLASSES  # noqa: E402

EXPERTS, DIM, HIDDEN, TOP_K = 5, 32, 48, 2
WEIGHTS = ("w1", "w2", "w3")


class Block(nn.Module):
    """A linear and an MoE layer with a shared expert."""

    def __init__(self, **args: Any):
        super().__init__()
        self.wq = nn.Linear(DIM, DIM, bias=False)
        self.moe = MoE(MoEArgs(num_experts=EXPERTS, num_shared_experts=1, top_k=TOP_K, **args), DIM, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(self.wq(x))


def make_block(*, grouped: bool = False, **args: Any) -> Block:
    block = Block(use_grouped_mm=grouped, **args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*block.parameters(), block.moe.tokens_per_expert, block.moe.expert_bias):
            value.normal_(std=0.3, generator=generator) if value.ndim > 1 else value.zero_()
    return block


def with_adapters(block: Block, *, fill: bool = True, **settings: Any) -> Block:
    config = LoRAConfig(**{"rank": 3, "target_modules": ["experts"], **settings})
    apply_lora(block, config, seed=5, expert_classes=EXPERT_CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in adapter_parameters(block).values() if fill else ():
            param.normal_(std=0.2, generator=generator)
    return block


X = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(2))


def plain_forward(weights: dict[str, torch.Tensor], x: torch.Tensor, *, before: bool, scaling: float) -> torch.Tensor:
    """The block with `weights` by their names: nothing of torchtitan's and nothing of ours."""

    def swiglu(x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            if expert is None:
                return x @ weights[f"moe.shared_experts.{name}.weight"].T
            name = f"moe.experts.{name}"
            y = x @ weights[name][expert].T
            if f"{name}_lora_a" in weights:
                y = y + scaling * (x @ weights[f"{name}_lora_a"][expert]) @ weights[f"{name}_lora_b"][expert].T
            return y

        return product("w2", F.silu(product("w1", x)) * product("w3", x))

    tokens = (x @ weights["wq.weight"].T).reshape(-1, DIM)
    scores = torch.sigmoid(tokens @ weights["moe.router.gate.weight"].T)
    best, chosen = scores.topk(TOP_K, dim=1)
    out = swiglu(tokens)
    for expert in range(EXPERTS):
        for rank in range(TOP_K):
            mine = (chosen[:, rank] == expert).nonzero().flatten()
            rows, score = tokens[mine], best[mine, rank].unsqueeze(1)
            out = out.index_add(0, mine, swiglu(rows * score, expert) if before else swiglu(rows, expert) * score)
    return x + out.view_as(x)


def gradients(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((out * seed).sum(), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def compare(block: Block, *, tolerance: float, before: bool, scaling: float = 32 / 3) -> None:
    """Output and all gradients; `tolerance` is relative, in norms."""
    x = X.clone().requires_grad_()
    trained = {name: param for name, param in block.named_parameters() if param.requires_grad}
    plain = {name: value.detach().clone().requires_grad_(name in trained) for name, value in block.named_parameters()}
    out, expected = block(x), plain_forward(plain, x, before=before, scaling=scaling)
    found = {"out": out, **gradients(out, {"x": x, **trained})}
    wanted = {"out": expected, **gradients(expected, {"x": x, **{name: plain[name] for name in trained}})}
    wrong = [name for name in wanted if not close(found[name], wanted[name], tolerance)]
    assert not wrong


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - wanted).norm() < tolerance * wanted.norm())


@pytest.mark.parametrize("before", [True, False], ids=["score before", "score after"])
@pytest.mark.parametrize("targets", [["experts"], ["*.experts.w1"], ["moe.experts.w2", "experts.w3"]])
def test_the_loop_is_the_plain_layer(before: bool, targets: list[str]) -> None:
    compare(
        with_adapters(make_block(score_before_experts=before), target_modules=targets), tolerance=1e-5, before=before
    )


@pytest.mark.parametrize("targets", [["experts"], ["experts.w2"]])
def test_grouped_products_in_bf16_are_the_plain_layer_but_for_rounding(targets: list[str]) -> None:
    """torchtitan's grouped path rounds to 8 bits: 4e-3 at each of a few products."""
    compare(with_adapters(make_block(grouped=True), target_modules=targets), tolerance=2e-2, before=True)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_a_grouped_product_is_one_product_per_expert(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    """One expert without rows, and rows that belong to none, which hold nan."""
    generator = torch.Generator().manual_seed(0)
    counts = [8, 0, 16, 8]
    x, weight, a, b = (
        torch.randn(shape, generator=generator) for shape in [(40, 16), (4, 24, 16), (4, 16, rank), (4, 24, rank)]
    )
    seed = torch.randn(32, 24, generator=generator)
    x[32:] = torch.nan
    x, a, b = (value.requires_grad_() for value in (x, a, b))
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32)

    out = grouped_linear(x.to(dtype), weight.to(dtype), a, b, offsets, scaling=0.5)[:32].float()
    found = [out, *torch.autograd.grad((out * seed).sum(), (x, a, b))]
    parts = [
        p @ w.T + 0.5 * (p @ a_e) @ b_e.T for p, w, a_e, b_e in zip(x[:32].split(counts), weight, a, b, strict=True)
    ]
    plain = torch.cat(parts)
    wanted = [plain, *torch.autograd.grad((plain * seed).sum(), (x, a, b))]
    for value, expected in zip(found, wanted, strict=True):
        value, expected = (v[:32] if v.shape == x.shape else v for v in (value, expected))
        assert (value - expected).norm() < tolerance * expected.norm()
    assert all(grad.is_contiguous() for grad in found[2:])


def saved(block: Block) -> int:
    """Bytes kept for the backward, each storage once, beside the parameters."""
    own = {param.untyped_storage().data_ptr() for param in block.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    held = []  # so that no storage is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (held.append(v), pack(v))[1], lambda v: v):
        block(X.clone().requires_grad_())
    return sum(kept.values())


def test_what_is_saved_more_is_the_inputs_and_the_small_products() -> None:
    """w1 and w3 share their input, of which the frozen layer keeps nothing; w2's is h."""
    rows = X.shape[0] * X.shape[1] * TOP_K
    more = saved(with_adapters(make_block())) - saved(make_block().requires_grad_(False))
    assert more == 4 * (rows * DIM + rows * HIDDEN + 3 * rows * 3)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [(func._schema.name, tuple(out.shape))] if isinstance(out, torch.Tensor) else []
        return out


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
def test_no_gradient_of_a_frozen_weight_is_computed(grouped: bool) -> None:
    block = with_adapters(make_block(grouped=grouped))
    out = block(X.clone().requires_grad_())
    with Operators() as seen:
        out.sum().backward()
    products = {shape for name, shape in seen.shapes if name in ("aten::mm", "aten::_grouped_mm", "aten::addmm")}
    full = {(EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM), (DIM, HIDDEN), (HIDDEN, DIM)}
    assert products and not products & full


def test_initial_values_follow_from_seed_name_and_number() -> None:
    block, other = (with_adapters(make_block(), fill=False) for _ in range(2))
    values = adapter_state_dict(block)
    assert all(torch.equal(value, adapter_state_dict(other)[name]) for name, value in values.items())
    for weight, features in {"w1": DIM, "w2": HIDDEN, "w3": DIM}.items():
        a, b = values[f"moe.experts.{weight}_lora_a"], values[f"moe.experts.{weight}_lora_b"]
        assert a.shape == (EXPERTS, features, 3) and not b.any()
        assert 0.9 / math.sqrt(features) < a.abs().max() <= 1 / math.sqrt(features)
        assert len({float(expert.sum()) for expert in a}) == EXPERTS
    reset_adapters(other, seed=6)
    assert not torch.equal(values["moe.experts.w1_lora_a"], adapter_state_dict(other)["moe.experts.w1_lora_a"])


def selected(*targets: str, exclude: tuple[str, ...] = ()) -> list[str]:
    block = with_adapters(make_block(), target_modules=list(targets), exclude_modules=list(exclude))
    return sorted({name.replace("_lora", ".lora").partition(".lora")[0] for name in adapter_parameters(block)})


LINEARS = ["moe.shared_experts.w1", "moe.shared_experts.w2", "moe.shared_experts.w3", "wq"]
ALL = ["moe.experts.w1", "moe.experts.w2", "moe.experts.w3"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["all-linear"], LINEARS),
        (["experts"], ALL),
        (["all-linear", "experts"], sorted([*ALL, *LINEARS])),
        (["moe.experts"], ALL),
        (["*.experts.w1"], ALL[:1]),
        (["*.experts.w[13]"], ALL[::2]),
        (["moe.experts.w2"], ALL[1:2]),
        (["moe.*"], ["moe.router.gate", *LINEARS[:3]]),  # said of linears
        (["w1"], LINEARS[:1]),
        (["*shared_experts*"], LINEARS[:3]),
        (["*experts*"], sorted([*ALL, *LINEARS[:3]])),
    ],
)
def test_targets_reach_experts_when_they_name_them(targets: list[str], expected: list[str]) -> None:
    assert selected(*targets) == expected


def test_what_is_excluded_is_excluded_whatever_it_is() -> None:
    assert selected("all-linear", "experts", exclude=("experts",)) == LINEARS
    assert selected("all-linear", "experts", exclude=("w2", "wq")) == [*ALL[::2], *LINEARS[:3:2]]
    assert selected("experts", "wq", exclude=("moe.*",)) == ["wq"]
    assert selected("experts", "all-linear", exclude=("all-linear",)) == ALL


def test_a_model_without_experts_says_what_there_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'experts' matches no linear of the model; the linears are 0\."):
        apply_lora(model, LoRAConfig(target_modules=["experts"]), expert_classes=EXPERT_CLASSES)
    with pytest.raises(
        ValueError, match=r"the linears are wq, gate, w1, w2, w3, and experts have w1, w2, w3, as in 'experts\.w1'\."
    ):
        with_adapters(make_block(), target_modules=["expert"])


def test_dropout_is_refused_and_nothing_is_changed() -> None:
    block = make_block()
    with pytest.raises(ValueError, match=r"lora.dropout = 0.1: adapters on routed experts have none, nor have PEFT's"):
        with_adapters(block, target_modules=["all-linear", "experts"], dropout=0.1)
    assert not list(adapted_modules(block)) and all(param.requires_grad for param in block.parameters())
    with_adapters(block, target_modules=["all-linear"], dropout=0.1)


def test_ranks_of_experts() -> None:
    def rank(**settings: Any) -> tuple[int, float]:
        block = with_adapters(make_block(), target_modules=["experts", "wq"], **settings)
        assert block.wq.lora_a.weight.shape[0] == 3
        config = block.moe.experts.lora_config
        assert block.moe.experts.w1_lora_a.shape[2] == config.rank
        return config.rank, config.scaling

    assert rank() == (3, 32 / 3)
    assert rank(expert_rank=2) == (2, 16)
    assert rank(expert_rank=2, rank_pattern={"experts": 4}, alpha_pattern={"moe.experts": 2}) == (4, 0.5)
    with pytest.raises(ValueError, match=r"lora.expert_rank = -1: must be an integer of at least 1, or 0"):
        LoRAConfig(expert_rank=-1)


@pytest.fixture
def block() -> Iterator[Block]:
    with torch.no_grad():
        yield with_adapters(make_block(), target_modules=["all-linear", "*.experts.w1", "*.experts.w2"])


def test_the_live_interface_has_experts(block: Block) -> None:
    plain, out = make_block(), block(X)
    base_out = plain(X)
    assert not torch.allclose(out, base_out)
    with disable_adapter(block):
        assert torch.equal(block(X), base_out)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    merge_adapter(block)
    assert close(block(X), out)
    assert torch.equal(block.moe.experts.w3, weights["moe.experts.w3"])
    unmerge_adapter(block)
    assert torch.equal(block(X), out)
    assert all(torch.equal(block.state_dict()[name], value) for name, value in weights.items())
    values = adapter_state_dict(block)
    with torch.no_grad():
        block.moe.experts.w1_lora_b.zero_()
    load_adapter_state_dict(block, values)
    assert torch.equal(block(X), out)
    merge_and_unload(block)
    assert close(block(X), out)
    assert type(block.moe.experts) is GroupedExperts and block.state_dict().keys() == plain.state_dict().keys()


def test_updates_come_expert_by_expert(block: Block) -> None:
    experts = block.moe.experts
    assert experts.merged_names() == ["w1", "w2"]
    for weight in experts.merged_names():
        a, b = getattr(experts, f"{weight}_lora_a"), getattr(experts, f"{weight}_lora_b")
        pieces = list(experts.local_updates(weight))
        assert {piece.shape for piece in pieces} == {(1, *getattr(experts, weight).shape[1:])}
        torch.testing.assert_close(torch.cat(pieces), torch.stack([32 / 3 * b[e] @ a[e].T for e in range(EXPERTS)]))
    unload_adapter(block)
    assert type(experts) is GroupedExperts and block.state_dict().keys() == make_block().state_dict().keys()


def test_peft_refuses_it_by_name(block: Block) -> None:
    says = r"A model by itself does not tell them: moe.experts.w1, moe.experts.w2\.$"
    with pytest.raises(ValueError, match=says):
        from_model(block)


def test_patterns_of_tables_and_short_globs_do_not_reach_experts_unsaid() -> None:
    config = LoRAConfig(rank=3, target_modules=["wq", "experts"], expert_rank=2, rank_pattern={"*": 7})
    ranks = {fqn: own.rank for fqn, own in configs_of(config, ["moe.wq"], ["moe.experts"]).items()}
    assert ranks == {"moe.wq": 7, "moe.experts": 2}
    config = replace(config, rank_pattern={"moe.exper*": 7})
    assert configs_of(config, ["moe.wq"], ["moe.experts"])["moe.experts"].rank == 7
    with pytest.raises(
        ValueError, match=r"'experts\.w1' matches no adapted linear .* one number per module: moe\.experts"
    ):
        configs_of(replace(config, rank_pattern={"experts.w1": 7}), ["moe.wq"], ["moe.experts"])
    assert select_targets(["moe.eq"], targets=["*e*"], experts=["moe.experts.w1"]) == ["moe.eq"]
    with pytest.raises(ValueError, match=r"experts have w1, as in 'experts\.w1'\.$"):
        select_targets(["moe.eq"], targets=["w1"], experts=["moe.experts.w1"])
