"""Packing loses nothing, splits nothing, fills rows, and depends on what it says it does."""

import time
import tracemalloc
from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_converter.chat.packing import Plan, plan

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


def realistic(n: int, seq_len: int = 4096, seed: int = 0) -> np.ndarray:
    """Chat data: most conversations are some hundred tokens long, a few fill a row."""
    lengths = np.random.default_rng(seed).lognormal(6.0, 0.9, n)
    return np.clip(lengths, 8, seq_len).astype(np.int32)


def members(found: Plan) -> list[list[int]]:
    return [found.examples[a:b].tolist() for a, b in zip(found.row_starts[:-1], found.row_starts[1:], strict=True)]


def rows_by_hand(lengths: list[int], seq_len: int) -> int:
    """Best-fit decreasing, one example after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        i = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(i) if i < len(rooms) else seq_len) - length)
    return len(rooms)


@given(lengths=LENGTHS, seq_len=st.integers(40, 90), seed=st.integers(0, 2**64), epoch=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_example_is_in_one_row_and_no_row_overflows(
    lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    found = plan(np.array(lengths, np.int32), seq_len, seed=seed, epoch=epoch)
    assert sorted(found.examples.tolist()) == list(range(len(lengths)))
    assert found.row_starts[0] == 0 and found.row_starts[-1] == len(lengths)
    assert all(0 < sum(lengths[i] for i in row) <= seq_len for row in members(found))
    assert found.rows == rows_by_hand(lengths, seq_len)


@given(lengths=LENGTHS, seed=st.integers(0, 99), epoch=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_without_packing_a_row_has_one_example(lengths: list[int], seed: int, epoch: int) -> None:
    found = plan(np.array(lengths, np.int32), 40, seed=seed, epoch=epoch, packing="none")
    assert sorted(members(found)) == [[i] for i in range(len(lengths))]


def test_the_number_of_rows_is_that_of_the_lengths_in_any_order() -> None:
    lengths = realistic(3000)
    counts = {plan(lengths, 4096, seed=seed, epoch=epoch).rows for seed in range(4) for epoch in range(4)}
    counts |= {plan(np.random.default_rng(i).permutation(lengths), 4096).rows for i in range(4)}
    assert len(counts) == 1


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_seed_and_epoch_choose_the_order_and_nothing_else_does(packing: str) -> None:
    lengths = (realistic(2000) // 64 + 1) * 64
    plans = {(s, e): members(plan(lengths, 8192, seed=s, epoch=e, packing=packing)) for s in (0, 1) for e in (0, 1, 2)}
    assert plans[1, 2] == members(plan(lengths.copy(), 8192, seed=1, epoch=2, packing=packing))
    keys = list(plans)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert plans[one] != plans[other]
            if packing == "documents":
                shared = {frozenset(row) for row in plans[one]} & {frozenset(row) for row in plans[other]}
                assert len(shared) < len(plans[one]) / 20, "the same examples meet again"


def test_the_order_is_the_same_under_every_version_of_numpy() -> None:
    lengths = np.array([9, 3, 4, 4, 2, 9, 1, 5, 4], np.int32)
    assert members(plan(lengths, 10, seed=3, epoch=5)) == [[1], [0], [7, 8, 6], [3, 2, 4], [5]]
    assert plan(lengths, 10, seed=3, epoch=5, packing="none").examples.tolist() == [6, 4, 1, 0, 8, 3, 2, 5, 7]


def test_the_order_is_mixed() -> None:
    order = plan(np.ones(10_000, np.int32), 1, packing="none").examples
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05  # 5 standard deviations
    assert len(np.unique(np.diff(order))) > 1000, "a lattice"


def test_packing_packs() -> None:
    lengths = realistic(20_000)
    found = plan(lengths, 4096)
    assert lengths.sum() / (found.rows * 4096) >= 0.999
    assert found.rows < len(lengths) / 5


def test_what_fits_no_row_is_refused() -> None:
    for lengths, message in [([5, 11], "hold examples of 1 to 10; here are from 5 to 11"), ([0], "from 0 to 0")]:
        with pytest.raises(ValueError, match=message):
            plan(np.array(lengths, np.int32), 10)
    with pytest.raises(ValueError, match="no examples"):
        plan(np.zeros(0, np.int32), 10)
    with pytest.raises(ValueError, match=r"chat\.packing = 'all': must be one of documents, none\."):
        plan(np.ones(1, np.int32), 10, packing="all")


def test_a_million_examples_take_a_moment_and_little_memory() -> None:
    lengths = realistic(1_000_000)
    began = time.process_time()
    found = plan(lengths, 4096, seed=1)
    seconds = time.process_time() - began
    tracemalloc.start()
    plan(lengths, 4096, seed=2)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 3  # 0.3 s of one core
    assert peak < 64e6 and kept < 1e6
    assert found.examples.nbytes + found.row_starts.nbytes < 6e6
    assert lengths.sum() / (found.rows * 4096) >= 0.999
