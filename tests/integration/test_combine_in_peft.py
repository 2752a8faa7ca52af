"""`lora-converter combine` against PEFT: its own sums of adapters, and its merged weights of what we write."""

import json
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tiny import tiny_llama
from moe_models import MODELS as MOE
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lora_converter.cli import main
from lora_converter.peft import CONFIG_FILE, load_peft

pytestmark = pytest.mark.filterwarnings(
    # PEFT looks for the keys of its patterns among the modules that it adapts, and not among the parameters.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96))


def make_adapter(make: Callable[[], PreTrainedModel], folder: Path, seed: int, **options: Any) -> Path:
    """PEFT's own, every factor away from where it began."""
    model = make()
    peft = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def combined(output: Path, *arguments: object) -> Path:
    assert main(["combine", *map(str, arguments), "--output", str(output)]) == 0
    return output


def merged(make: Callable[[], PreTrainedModel], folder: Path) -> dict[str, torch.Tensor]:
    """The weights, by PEFT, in fp64; a directory of which it misses or does not know a key fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) (adapter )?keys.*")
        return PeftModel.from_pretrained(make().double(), folder).merge_and_unload().state_dict()


def check_sum(
    make: Callable[[], PreTrainedModel], terms: Iterable[tuple[Path, float]], found: Path, *, bound: float = 1e-6
) -> None:
    """Each weight has the sum of what PEFT adds to it for each adapter; fp32's rounding of B is 6e-8."""
    base = {name: value.double() for name, value in make().state_dict().items()}
    expected, sizes = {name: torch.zeros_like(value) for name, value in base.items()}, dict.fromkeys(base, 0.0)
    for folder, weight in terms:
        for name, value in merged(make, folder).items():
            expected[name] += weight * (value - base[name])
            sizes[name] += abs(weight) * float((value - base[name]).norm())
    ours = merged(make, found)
    assert ours.keys() == base.keys() and any(sizes.values())
    for name, value in ours.items():
        error = float((value - base[name] - expected[name]).norm())
        assert error <= bound * sizes[name] + 1e-14 * float(base[name].norm()), (name, error, sizes[name])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def peft_sum(make: Callable[[], PreTrainedModel], terms: list[tuple[Path, float]], **options: Any) -> torch.Tensor:
    """Logits of PEFT's own sum of adapters."""
    model = PeftModel.from_pretrained(make(), terms[0][0], adapter_name="0")
    for number, (folder, _) in enumerate(terms[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.add_weighted_adapter(
        [str(number) for number in range(len(terms))], [weight for _, weight in terms], "sum", **options
    )
    model.set_adapter("sum")
    return logits(model)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_logits_are_those_of_pefts_own_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_adapter(tiny_llama, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=ATTENTION)
    b = make_adapter(tiny_llama, tmp_path / "b", 2, r=6, lora_alpha=3, use_rslora=True, target_modules=ATTENTION)
    c = make_adapter(tiny_llama, tmp_path / "c", 3, r=2, lora_alpha=2, target_modules=ATTENTION)
    terms = [(a, 0.7), (b, -0.3), (c, 1.0)]
    arguments = [f"{folder}:{weight:g}" for folder, weight in terms[:2]] + [c]

    exact = combined(tmp_path / "exact", *arguments)
    ours = logits(PeftModel.from_pretrained(tiny_llama(), exact))
    assert relative(ours, peft_sum(tiny_llama, terms, combination_type="cat")) < 1e-5
    check_sum(tiny_llama, terms, exact)
    assert {load_peft(exact).rank_of(module) for module in load_peft(exact).factors} == {12}
    assert "modules of rank 12 in float32: relative error " in capsys.readouterr().out

    short = combined(tmp_path / "short", *arguments, "--rank", 5)
    ours = logits(PeftModel.from_pretrained(tiny_llama(), short))
    assert relative(ours, peft_sum(tiny_llama, terms, combination_type="svd", svd_rank=5)) < 1e-5
    assert relative(ours, logits(PeftModel.from_pretrained(tiny_llama(), exact))) > 1e-2
    printed = capsys.readouterr().out.splitlines()
    assert sum("rank 5 of 12  relative error " in line for line in printed) == len(load_peft(short).factors)


def test_the_printed_errors_are_those_of_the_dense_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_adapter(tiny_llama, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=ATTENTION)
    b = make_adapter(tiny_llama, tmp_path / "b", 2, r=4, lora_alpha=5, target_modules=[*ATTENTION, "up_proj"])
    exact, short = combined(tmp_path / "exact", a, f"{b}:2"), tmp_path / "short"
    capsys.readouterr()
    combined(short, a, f"{b}:2", "--rank", 3)
    printed = dict(line.split("  rank ") for line in capsys.readouterr().out.splitlines() if "  rank " in line)
    full, cut = load_peft(exact), load_peft(short)
    assert printed.keys() == full.factors.keys()
    squares = torch.zeros(2, dtype=torch.float64)
    for module in full.factors:
        whole, part = full.delta_weight(module).double(), cut.delta_weight(module).double()
        singular = torch.linalg.svdvals(whole)
        assert float(printed[module].split()[-1]) == pytest.approx(relative(part, whole), rel=1e-2)
        # No approximation of the rank is better (Eckart and Young).
        assert float((part - whole).norm()) == pytest.approx(float(singular[3:].norm()), rel=1e-4)
        squares += torch.stack([(part - whole).square().sum(), whole.square().sum()])
    (overall,) = (squares[0] / squares[1]).sqrt()[None]
    capsys.readouterr()
    combined(tmp_path / "again", a, f"{b}:2", "--rank", 3)
    last = capsys.readouterr().out.splitlines()[-2]
    assert float(last.split("relative error ")[1].split()[0]) == pytest.approx(float(overall), rel=1e-2)


def random_options(rng: random.Random, linears: list[str], *, transposed: bool) -> dict[str, Any]:
    targets = rng.sample(linears, rng.randint(1, len(linears)))
    options: dict[str, Any] = {
        "r": rng.choice([1, 2, 4, 7]),
        "lora_alpha": rng.choice([1, 4, 8, 6]),
        "use_rslora": rng.random() < 0.4,
        "target_modules": targets,
        "fan_in_fan_out": transposed,
    }
    if rng.random() < 0.4:
        options["rank_pattern"] = {targets[0]: 5}
    if rng.random() < 0.4:
        options["alpha_pattern"] = {rf".*\.0\..*{targets[-1]}": 3}
    if rng.random() < 0.3:
        options["layers_to_transform"] = [rng.choice([0, 1])]
    return options


@pytest.mark.parametrize("seed", range(14))
def test_random_adapters_of_random_settings_add_up_to_what_peft_adds_for_each(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    make, linears = (tiny_gpt2, ["c_attn", "c_proj", "c_fc"]) if seed % 4 == 3 else (tiny_llama, ATTENTION + MLP)
    terms = []
    for number in range(rng.choice([2, 2, 3])):
        options = random_options(rng, linears, transposed=make is tiny_gpt2)
        folder = make_adapter(make, tmp_path / f"{number}", 10 * seed + number, **options)
        terms.append((folder, rng.choice([1.0, 0.5, -1.0, 0.3, -2.25, 0.0][: 6 if number else 5])))
    subtracts = rng.random() < 0.4
    arguments = [folder if weight == 1 else f"{folder}:{weight}" for folder, weight in terms]
    sum_ = combined(tmp_path / "sum", *arguments, *["--subtract"] * subtracts)
    signed = [(folder, -weight if subtracts and n else weight) for n, (folder, weight) in enumerate(terms)]
    check_sum(make, signed, sum_)
    # A rank that the sum fits into takes nothing away.
    check_sum(make, signed, combined(tmp_path / "wide", *arguments, "--rank", 21, *["--subtract"] * subtracts))


@pytest.mark.parametrize("name", MOE)
def test_adapters_on_stacked_experts_add_up(name: str, tmp_path: Path) -> None:
    attention = "q_b_proj" if name == "deepseek_v3" else "q_proj"
    both = ["experts.gate_up_proj", "experts.down_proj"]
    terms = [
        (make_adapter(MOE[name], tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=[attention],
                      target_parameters=both), 0.5),
        (make_adapter(MOE[name], tmp_path / "b", 2, r=2, lora_alpha=8, target_modules=["o_proj"],
                      rank_pattern={"down_proj": 3}, target_parameters=both), -1.0),
    ]  # fmt: skip
    check_sum(MOE[name], terms, combined(tmp_path / "sum", *(f"{folder}:{weight}" for folder, weight in terms)))
    MOE[name]().save_pretrained(tmp_path / "base")
    if name not in ("qwen3_moe", "deepseek_v3", "mixtral"):  # their folders hold experts one by one
        options = ["--base", tmp_path / "base"]
        check_sum(MOE[name], terms, combined(tmp_path / "2", *(f"{f}:{weight}" for f, weight in terms), *options))


def test_adapters_on_experts_one_by_one_add_up_beside_dense_layers_of_the_same_names(tmp_path: Path) -> None:
    """With the base's folder stacks become adapters of single experts, which PEFT stacks again when it loads them."""
    make = MOE["deepseek_v3"]
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_b_proj"]}
    make().save_pretrained(tmp_path / "base")
    terms = [
        (make_adapter(make, tmp_path / "a", 1, target_parameters=experts, **options), 0.5),
        (make_adapter(make, tmp_path / "b", 2, target_parameters=["shared_experts.down_proj.weight"], **options), 2.0),
    ]
    arguments = [f"{folder}:{weight}" for folder, weight in terms]
    check_sum(make, terms, combined(tmp_path / "stacked", *arguments))
    check_sum(make, terms, combined(tmp_path / "single", *arguments, "--base", tmp_path / "base"))
    # As PEFT wrote it when transformers kept experts apart: 0.21 would load it, and drop its factors without a word.
    path = terms[1][0] / CONFIG_FILE
    config = json.loads(path.read_text())
    old = {**config, "target_parameters": None, "target_modules": ["q_b_proj", "shared_experts.down_proj"]}
    path.write_text(json.dumps(old))
    combined(tmp_path / "of an old one", *arguments)
    path.write_text(json.dumps(config))
    check_sum(make, terms, tmp_path / "of an old one")
    names = load_peft(tmp_path / "single").factors
    assert any(".experts.3.gate_proj" in name for name in names) and not any("gate_up" in name for name in names)


def test_an_adapter_minus_itself_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_adapter(tiny_llama, tmp_path / "a", 1, r=4, lora_alpha=7, target_modules=ATTENTION)
    for number, arguments in enumerate([[f"{a}:1", f"{a}:-1"], [a, a, "--subtract"], [f"{a}:0.7", f"{a}:-0.7"]]):
        for rank in ([], ["--rank", 4]):
            folder = combined(tmp_path / f"{number}{len(rank)}", *arguments, *rank)
            assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), logits(tiny_llama()))
    assert "their terms cancel, or are zero" in capsys.readouterr().out


def test_bf16_in_is_bf16_out_and_the_first_adapter_bit_for_bit(tmp_path: Path) -> None:
    a = make_adapter(tiny_llama, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=ATTENTION)
    b = make_adapter(tiny_llama, tmp_path / "b", 2, r=4, lora_alpha=8, target_modules=ATTENTION)
    halves = [combined(tmp_path / f"{path.name}16", path, "--dtype", "bfloat16") for path in (a, b)]
    found = load_peft(combined(tmp_path / "sum", f"{halves[0]}:0.7", f"{halves[1]}:0.3"))
    one, two = (load_peft(half) for half in halves)
    for module, (down, up) in found.factors.items():
        assert down.dtype == up.dtype == torch.bfloat16
        assert torch.equal(down, torch.cat([one.factors[module][0], two.factors[module][0]]))
        assert torch.equal(up[:, :4], one.factors[module][1])
    check_sum(tiny_llama, [(halves[0], 0.7), (halves[1], 0.3)], tmp_path / "sum", bound=2**-8)
    assert load_peft(combined(tmp_path / "mixed", a, halves[1])).factors[module][0].dtype == torch.float32
