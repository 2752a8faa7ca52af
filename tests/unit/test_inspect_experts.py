"""`inspect` on adapters of routed experts: one line per product, whatever the number of experts."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from memory import Made
from safetensors.torch import save_file

from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.peft_directory import load_peft, save_peft
from lora_converter.inspect import _Weights, describe_adapter, describe_model
from lora_converter.inspect_experts import update_norm

EXPERTS, WIDE, NARROW, RANK = 12, 20, 16, 3
LAYER = "model.layers.0.mlp.experts"
Pair = tuple[torch.Tensor, torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_experts(untouched: set[int] = frozenset(), experts: int = EXPERTS, product: str = "up_proj") -> dict[str, Pair]:
    def b(e: int) -> torch.Tensor:
        return torch.zeros(WIDE, RANK) if e in untouched else normal(WIDE, RANK, seed=100 + e)

    return {f"{LAYER}.{e}.{product}": (normal(RANK, NARROW, seed=e), b(e)) for e in range(experts)}


def stacked(factors: dict[str, Pair]) -> dict[str, Pair]:
    a, b = zip(*factors.values(), strict=True)
    return {f"{LAYER}.gate_up_proj": (torch.stack(a), torch.stack(b))}


def adapter(factors: dict[str, Pair]) -> PeftAdapter:
    return PeftAdapter(factors, RANK, 6.0, 0.0, False, sorted({name.rpartition(".")[2] for name in factors}))


def lines(factors: dict[str, Pair], **options: Path) -> list[str]:
    head, _, body = describe_adapter(adapter(factors), **options).partition("\n\n")
    return [head.splitlines()[2], *body.splitlines()]


def deltas(factors: dict[str, Pair]) -> list[torch.Tensor]:
    return [2.0 * b.double() @ a.double() for a, b in factors.values()]


def test_a_line_has_the_spread_of_the_touched_and_the_ranges_of_the_others() -> None:
    factors = of_experts({3, 7, 8, 9})
    norms = {e: float(delta.norm()) for e, delta in enumerate(deltas(factors)) if e not in {3, 7, 8, 9}}
    largest, ordered = max(norms, key=norms.__getitem__), sorted(norms.values())
    linear = {"model.layers.0.self_attn.q_proj": (normal(RANK, NARROW), normal(WIDE, RANK))}
    told = lines({**factors, **linear})
    assert told[0].startswith("1 linears and 1 products of 12 experts, ")
    assert told[1] == f"model.layers.0.self_attn.q_proj  20 x 16  |update| {deltas(linear)[0].norm():.3e}"
    assert told[2:] == [
        f"{LAYER}.*.up_proj  12 experts of 20 x 16  |update| {ordered[0]:.3e} to {ordered[-1]:.3e} (expert {largest}), "
        f"median {(ordered[3] + ordered[4]) / 2:.3e}  untouched: 3, 7-9"
    ]


def test_stacked_experts_have_the_numbers_that_they_have_one_by_one() -> None:
    """As many experts as ranks, so that no axis is told by its size."""
    factors = of_experts({1}, experts=RANK)
    one_by_one, stack = lines(factors), lines(stacked(factors))
    assert one_by_one[0].partition(",")[0] == stack[0].partition(",")[0] == "1 products of 3 experts"
    assert stack[1].replace("gate_up_proj", "*.up_proj") == one_by_one[1] and stack[1].endswith("untouched: 1")


def test_products_and_layers_have_lines_of_their_own() -> None:
    two = {**of_experts(product="up_proj"), **of_experts(product="down_proj", experts=10)}
    told = lines(two)
    assert told[0].startswith("2 products of 10 to 12 experts, ")
    assert [line.split()[0] for line in told[1:]] == [f"{LAYER}.*.down_proj", f"{LAYER}.*.up_proj"]


def test_untouched_experts_are_no_fault_and_all_of_them_are() -> None:
    assert "ALL ZERO" not in lines(of_experts(set(range(11))))[1]
    assert lines(of_experts(set(range(12))))[1] == f"{LAYER}.*.up_proj  12 experts of 20 x 16  ALL ZERO"
    without_a = {name: (torch.zeros_like(a), b) for name, (a, b) in of_experts().items()}
    assert lines(without_a)[1].endswith("ALL ZERO")


def test_broken_experts_are_numbered_and_leave_the_others_numbers() -> None:
    factors = of_experts({4})
    for e in (5, 6):
        factors[f"{LAYER}.{e}.up_proj"][1][0, 0] = torch.nan
    line = lines(factors)[1]
    assert line.endswith("untouched: 4  NOT FINITE: 5-6") and "nan" not in line


@pytest.mark.parametrize("form", ["one by one", "stacked"])
def test_beside_a_base_it_says_how_large_the_updates_are_and_reads_one_expert_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    factors = of_experts({0}, experts=RANK)
    weights = {f"{LAYER}.{e}.up_proj.weight": normal(WIDE, NARROW, seed=e + 50) for e in range(RANK)}
    shares = [
        100 * float(delta.norm() / weight.double().norm())
        for delta, weight in zip(deltas(factors), weights.values(), strict=True)
    ][1:]
    if form == "stacked":
        factors, weights = stacked(factors), {f"{LAYER}.gate_up_proj": torch.stack([*weights.values()])}
    save_file(weights, tmp_path / "model.safetensors")
    seen: list[int] = []
    read = _Weights.read
    monkeypatch.setattr(_Weights, "read", lambda *args: (seen.append(read(*args).numel()), read(*args))[1])
    line = lines(factors, base=tmp_path)[1]
    assert seen == [WIDE * NARROW] * (RANK - 1)
    spread = f"{min(shares):.3g} to {max(shares):.3g} (expert {1 + shares.index(max(shares))})"
    assert f"  {spread}, median {sum(shares) / 2:.3g} % of |weight|" in line


def test_a_base_of_zeros_is_no_error(tmp_path: Path) -> None:
    save_file({f"{name}.weight": torch.zeros(WIDE, NARROW) for name in of_experts()}, tmp_path / "model.safetensors")
    assert "  inf to inf (expert 0), median inf % of |weight|" in lines(of_experts(), base=tmp_path)[1]


def test_a_base_without_the_experts_is_named(tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"The base has no {LAYER}\.0\.up_proj\.weight\. Name the Hugging Face"):
        describe_adapter(adapter(of_experts()), base=tmp_path)


def test_it_reads_a_folder_with_experts_one_by_one(tmp_path: Path) -> None:
    save_peft(adapter(of_experts({2})), tmp_path / "adapter")
    assert describe_adapter(load_peft(tmp_path / "adapter")) == describe_adapter(adapter(of_experts({2})))


def test_norms_need_no_product_and_are_exact_for_small_updates_of_large_factors() -> None:
    """A's rows are nearly equal and B's columns nearly opposite: what is left is a millionth of either."""
    a, b = normal(1, 200).repeat(2, 1), normal(300, 1) * torch.tensor([1.0, -1.0])
    a[1] += 1e-6 * normal(200, seed=1)
    expected = float((b.double() @ a.double()).norm())
    with Made() as made:
        found = update_norm(a, b, 1.0)
    assert abs(found - expected) < 1e-3 * expected and made.largest <= 2 * 300


def test_a_released_model_is_counted_by_its_weights(tmp_path: Path) -> None:
    tensors = {
        "experts.gate_up_proj_blocks": torch.ones(2, 8, 3, 16, dtype=torch.uint8),
        "experts.gate_up_proj_scales": torch.ones(2, 8, 3, dtype=torch.uint8),
        "q.weight": torch.ones(4, 6).to(torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.ones(1, 1),
        "lone_scales": torch.ones(5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(value.nbytes for value in tensors.values())
    assert f"5 weights, {2 * 8 * 3 * 32 + 4 * 6 + 5:,} parameters, {size:,} bytes" in describe_model(tmp_path)


def test_a_folder_of_bitsandbytes_is_counted_by_its_weights_and_its_codes_are_no_weights(tmp_path: Path) -> None:
    weight, stored = normal(24, 128).bfloat16(), {"other.weight": torch.ones(3, 5)}
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    stored["q.weight"] = codes
    stored |= {f"q.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert f" {24 * 128 + 3 * 5:,} parameters," in describe_model(tmp_path)
    factors = {name: (torch.ones(2, 128), torch.ones(24, 2)) for name in ("q", "other")}
    with pytest.raises(ValueError, match=r"q\.weight is quantized in the base: an update cannot be shown beside it"):
        describe_adapter(adapter(factors), base=tmp_path)
