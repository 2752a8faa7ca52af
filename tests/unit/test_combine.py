"""Sums of PEFT directories: what is added, named and refused. Against PEFT's own: test_combine_in_peft.py."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from lora_converter.cli import main
from lora_converter.combine import Term, combine, parse_term
from lora_converter.hf.weighted_sum import product_norm, truncated
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, load_peft, save_peft

Q, K, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.experts"
SHAPES = {Q: (8, 6), K: (4, 6)}


def an_adapter(seed: int, rank: int = 2, modules: tuple[str, ...] = (Q, K), **options: object) -> PeftAdapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
        for name in modules
        for rows, columns in [next(shape for end, shape in SHAPES.items() if name[-6:] == end[-6:])]
    }
    targets = [name.rpartition(".")[2] for name in modules]
    return replace(PeftAdapter(factors, rank, 4.0, 0.1, False, targets, "org/base"), **options)


def saved(folder: Path, adapter: PeftAdapter, **fields: object) -> Path:
    save_peft(adapter, folder)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refusal(*terms: Term, output: Path, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        combine(terms, output, **options)
    assert not output.exists() and not output.with_name(f"{output.name}.incomplete").exists()
    return str(error.value)


def test_a_term_is_a_path_and_a_weight_and_a_colon_in_a_path_is_none_if_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a:b", "only:2", "both:2", "both"):
        os.mkdir(name)
    assert parse_term("a") == Term(Path("a")) and parse_term("a:-0.5") == Term(Path("a"), -0.5)
    assert parse_term("a:1e-3").weight == 1e-3 and parse_term("missing:2") == Term(Path("missing"), 2.0)
    assert parse_term("a:b") == Term(Path("a:b")) and parse_term("a:b:3") == Term(Path("a:b"), 3.0)
    assert parse_term("only:2") == Term(Path("only:2")) and parse_term("only:2:2") == Term(Path("only:2"), 2.0)
    with pytest.raises(ValueError, match=r"both:2 and both are both folders\. Write both:2:1 or both/:2"):
        parse_term("both:2")
    assert parse_term("both:2:1") == Term(Path("both:2")) and parse_term("both/:2") == Term(Path("both"), 2.0)
    for text, number in (("a:x", "x"), ("a:nan", "nan"), ("a:-inf", "-inf"), ("a:", "")):
        with pytest.raises(ValueError, match=f"{text}: no such folder, and '{number}' is no finite number"):
            parse_term(text)


def test_the_settings_of_the_result_are_one_scaling_ranks_of_its_own_and_whole_names(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", an_adapter(0, 2))
    b = saved(tmp_path / "b", an_adapter(1, 3, (Q,), alpha=9.0))
    result = combine([Term(a), Term(b, 0.5)], tmp_path / "sum").adapter
    config = json.loads((tmp_path / "sum" / CONFIG_FILE).read_text())
    # 2 of a, twice; 1.5 of b, once.
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 10, False)
    assert config["rank_pattern"] == {K: 2} and config["alpha_pattern"] == {K: 4}
    assert config["target_modules"] == [K, Q] and config["base_model_name_or_path"] == "org/base"
    assert {load_peft(tmp_path / "sum").scaling_of(module) for module in (Q, K)} == {2.0}
    for module, pairs in {Q: [(a, 1.0), (b, 0.5)], K: [(a, 1.0)]}.items():
        expected = sum(weight * load_peft(folder).delta_weight(module) for folder, weight in pairs)
        torch.testing.assert_close(result.delta_weight(module), expected, rtol=1e-6, atol=1e-6)


def test_terms_of_weight_0_take_no_rank(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", an_adapter(0, 2, (Q,))), saved(tmp_path / "b", an_adapter(1, 3))
    found = combine([Term(a), Term(b, 0.0)], tmp_path / "sum").adapter
    assert found.rank_of(Q) == 2 and torch.equal(found.delta_weight(Q), load_peft(a).delta_weight(Q))
    assert not found.factors[K][1].any()


def test_one_adapter_alone_is_scaled_or_cut_to_a_rank(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", an_adapter(0, 4))
    doubled = combine([Term(a, -2.0)], tmp_path / "doubled").adapter
    assert all(torch.equal(doubled.delta_weight(m), -2 * load_peft(a).delta_weight(m)) for m in (Q, K))
    cut = combine([Term(a)], tmp_path / "cut", rank=1)
    assert cut.adapter.rank == 1 and all(d.error > 0.01 * d.norm for d in cut.deviations.values())


def test_no_more_than_the_ranks_size_is_decomposed() -> None:
    """A weight of this size would take 2 TB."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(500_000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = truncated(left, right.mT, 2)
    difference = product_norm(torch.cat([left, -kept[0]], dim=1), torch.cat([right.mT, kept[1]]))
    assert 0.1 < difference / product_norm(left, right.mT) < 1


def test_adapters_of_different_bases_are_refused_unless_that_is_accepted(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", an_adapter(0, base_fingerprint="1" * 8))
    b = saved(tmp_path / "b", an_adapter(1, base_fingerprint="2" * 8))
    c = saved(tmp_path / "c", an_adapter(2, base_model="other/Base", base_fingerprint="1" * 8))
    d = saved(tmp_path / "d", an_adapter(3, base_model="other/model"))
    output = tmp_path / "sum"
    says = f"made for different bases: 11111111 ({a}), 22222222 ({b}). "
    assert says in refusal(Term(a), Term(b), output=output)
    assert f"different bases: base ({a}), model ({d}). " in refusal(Term(a), Term(d), output=output)
    # One fingerprint, or else one name, is one base, wherever it lies.
    assert combine([Term(a), Term(c)], output).adapter.base_fingerprint == "1" * 8
    accepted = combine([Term(a), Term(b)], tmp_path / "accepted", accept_other_base=True)
    assert accepted.adapter.base_fingerprint == ""


def test_what_does_not_add_up_is_refused_by_name(tmp_path: Path) -> None:
    a, output = saved(tmp_path / "a", an_adapter(0)), tmp_path / "sum"
    other = an_adapter(1)
    with_magnitudes = replace(other, magnitudes={m: b.norm(dim=1) for m, (_, b) in other.factors.items()})
    dora = saved(tmp_path / "dora", with_magnitudes)
    assert f"{dora} is a DoRA adapter (use_dora = true)" in refusal(Term(a), Term(dora), output=output)
    wide = an_adapter(1)
    wide.factors[Q] = (torch.ones(2, 7), torch.ones(8, 2))
    says = f"of different models: {Q} is (8, 6) and (8, 7)"
    assert says in refusal(Term(a), Term(saved(tmp_path / "wide", wide)), output=output)
    broken = an_adapter(1)
    broken.factors[Q][0][0, 0] = torch.nan
    says = f"the factors of {Q} hold nan or inf"
    assert says in refusal(Term(saved(tmp_path / "nan", broken)), Term(a), output=output)
    assert "--rank 0: must be at least 1" in refusal(Term(a), output=output, rank=0)
    large = an_adapter(1)
    large.factors[Q][1].fill_(1e5)
    says = "would hold inf in torch.float16"
    assert says in refusal(Term(saved(tmp_path / "large", large)), output=output, dtype=torch.float16)


def test_an_output_that_is_there_stays_and_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", an_adapter(0)), saved(tmp_path / "b", an_adapter(1))
    before = (b / WEIGHTS_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        combine([Term(a)], b)
    assert (b / WEIGHTS_FILE).read_bytes() == before
    with (
        mock.patch("lora_converter.hf.peft_directory.write_tensors", side_effect=OSError("No space")),
        pytest.raises(OSError, match="No space"),
    ):
        combine([Term(a)], tmp_path / "sum")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_other_names_of_the_same_modules_are_the_first_adapters(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", an_adapter(0))
    b = saved(tmp_path / "b", an_adapter(1, modules=tuple(name.removeprefix("model.") for name in (Q, K))))
    assert combine([Term(a), Term(b)], tmp_path / "sum").adapter.factors.keys() == {Q, K}


def test_subtracting_takes_all_others_from_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [saved(tmp_path / name, an_adapter(seed)) for seed, name in enumerate("abc")]
    terms = [f"{folders[0]}:2", f"{folders[1]}:0.5", f"{folders[2]}:-1"]
    assert main(["combine", "--subtract", *terms, "--output", str(tmp_path / "sum")]) == 0
    a, b, c = (load_peft(folder).delta_weight(Q) for folder in folders)
    found = load_peft(tmp_path / "sum").delta_weight(Q)
    torch.testing.assert_close(found, 2 * a - 0.5 * b + c, rtol=1e-6, atol=1e-6)
    assert main(["combine", "--subtract", terms[0], "--output", str(tmp_path / "one")]) == 1
    assert "nothing to subtract from it" in capsys.readouterr().err
