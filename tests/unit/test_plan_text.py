"""What a plan says of figures that are given."""

import re

from lora_converter.plan import ACTIVATIONS, BASE, GRADIENTS, LOSS, OPTIMIZER, TRAINED, WORKING, Estimate, Plan

GIB = 2**30


def an_estimate(activations: float = 20.0) -> Estimate:
    kept = int(activations * GIB)
    return Estimate(
        trained=42_000_000,
        frozen=8_000_000_000,
        sizes={BASE: 16 * GIB, TRAINED: GIB // 4, GRADIENTS: GIB // 4, OPTIMIZER: GIB // 2},
        saved=kept,
        most={BASE: 16 * GIB, GRADIENTS: 0, ACTIVATIONS: kept + 7, LOSS: 2 * GIB, WORKING: GIB},
        at_peak={BASE: 16 * GIB, TRAINED: GIB // 4, OPTIMIZER: GIB // 2, ACTIVATIONS: kept, LOSS: GIB},
    )


def a_plan(memory: float, **parts: object) -> str:
    found = an_estimate()
    given = dict(by_checkpointing={"none (as set)": found}, variations={}, notes=["DDP's buckets: a formula."])
    return str(Plan("my.toml: a job", found, memory, **{**given, **parts}))


def test_the_peak_is_the_sum_that_stands_behind_it() -> None:
    line = next(line for line in a_plan(80).splitlines() if line.startswith("peak "))
    peak, *terms = map(float, re.findall(r"\d+\.\d+", line))
    assert peak == sum(terms) == 37.75
    assert "gradients" not in line  # there are none then


def test_a_kind_has_its_gib_its_bytes_and_what_it_is() -> None:
    plan = a_plan(80)
    assert re.search(rf"^  optimizer +0\.50 +{GIB // 2:,}  its state$", plan, re.M)
    assert re.search(r"^  gradients +0\.25 +268,435,456 ", plan, re.M)  # those of a step, not those at its end
    assert "20.00 GiB kept for the backward" in plan and "communication" not in plan
    assert "42M trained (42,000,000), 8B frozen (8,000,000,000)" in plan and "- DDP's buckets: a formula." in plan


def test_what_fits_fits_with_a_tenth_to_spare() -> None:
    assert "Fits in 42 GiB: 37.75 + 10 % = 41.52." in a_plan(42)
    assert "Does not fit in 41 GiB: 37.75 + 10 % = 41.52." in a_plan(41)


def test_variations_have_their_own_sums_or_a_reason() -> None:
    variations = {"full AC": an_estimate(2.0), "TP 64, 64 GPUs": "32 heads"}
    lines = a_plan(30, variations=variations).splitlines()
    full = next(line for line in lines if line.startswith("  full AC "))
    assert "activations kept    2.00, peak   19.75, fits: peak 19.75 GiB = base 16.00 + " in full
    assert "  TP 64, 64 GPUs        not possible: 32 heads" in lines
