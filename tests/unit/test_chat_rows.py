"""Rows keep examples whole and apart; every rank has its own rows, each once per epoch, however a run is cut up."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_words import built, conversations, ids_of, said, write_lines

from lora_converter.chat.crew import Crew
from lora_converter.chat.dataset import Dataset
from lora_converter.chat.order import TrainingOrder, ValidationOrder
from lora_converter.chat.rows import IGNORED, Batch, Rows, steps_for

PAD = 70_000  # no word's


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("rows")
    return built(write_lines(folder / "train.jsonl", conversations(23)), folder / "cache").dataset()


def rows_of(dataset: Dataset, **more: Any) -> Rows:
    return Rows(dataset, **{"seq_len": 30, "pad_id": PAD, **more})


def test_a_row_is_its_examples_one_after_the_other_and_padding(dataset: Dataset) -> None:
    rows = rows_of(dataset)
    for k in range(rows.per_epoch):
        row, members = rows.row(k), rows.examples(k)
        inputs: list[int] = []
        labels: list[int] = []
        documents: list[int] = []
        for number, i in enumerate(members, 1):
            words, ids = said(i).split(), ids_of(said(i)).tolist()
            inputs += ids[:-1]
            labels += [ids[j] if words[j].endswith("!") else IGNORED for j in range(1, len(words))]
            documents += [number] * (len(words) - 1)
        padding = 30 - len(inputs)
        assert row.input.tolist() == inputs + [PAD] * padding
        assert row.label.tolist() == labels + [IGNORED] * padding
        assert row.documents.tolist() == documents + [0] * padding
        assert row.input.dtype == row.label.dtype == row.documents.dtype == np.int64


def test_packing_that_packs_nothing_or_splits_answers_rows_are_shared_and_each_answer_is_whole(
    dataset: Dataset,
) -> None:
    rows = rows_of(dataset)
    assert rows.per_epoch < len(dataset) / 2 and rows.fill > 0.9
    assert rows.fill == int(dataset.lengths.sum()) / (30 * rows.per_epoch)
    labels = [label for k in range(rows.per_epoch) for label in rows.row(k).label.tolist() if label != IGNORED]
    wanted = [int(ids_of(word)[0]) for i in range(23) for word in said(i).split() if word.endswith("!")]
    assert sorted(labels) == sorted(wanted)


def test_loss_across_documents_a_label_is_of_the_conversation_of_its_input(dataset: Dataset) -> None:
    said_in = {int(token): i for i in range(23) for token in ids_of(said(i))}
    rows = rows_of(dataset)
    pairs = [
        (said_in[token], said_in[label])
        for row in map(rows.row, range(rows.per_epoch))
        for token, label in zip(row.input.tolist(), row.label.tolist(), strict=True)
        if label != IGNORED
    ]
    assert len(pairs) == dataset.counts.trained_tokens and all(one == other for one, other in pairs)


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_all_minus_100_no_row_that_is_trained_is_without_a_label(packing: Any, tmp_path: Path) -> None:
    """Wherever a conversation is cut: so no micro-batch and no rank of a step is without one, and no loss is 0 / 0."""
    records = [{"messages": [said(i), f"{said(i, i % 7 + 1).replace('!', '')} so{i}!"]} for i in range(40)]
    data = write_lines(tmp_path / "train.jsonl", records)
    for seq_len in (2, 3, 7):
        for too_long in ("drop", "truncate"):
            dataset = built(data, tmp_path / "cache", seq_len=seq_len, too_long=too_long).dataset()
            rows = rows_of(dataset, seq_len=seq_len, packing=packing)
            assert all((rows.row(k).label != IGNORED).any() for k in range(2 * rows.per_epoch))


def test_padding_attends_to_padding_alone(dataset: Dataset) -> None:
    row = rows_of(dataset, packing="none").row(0)
    at = np.arange(30)
    attends = (row.documents[:, None] == row.documents[None, :]) & (at[:, None] >= at[None, :])
    padding = row.input == PAD
    assert padding.any() and not attends[~padding][:, padding].any() and not attends[padding][:, ~padding].any()
    assert attends.any(axis=1).all(), "a softmax over nothing"


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_each_epoch_has_each_example_once_in_an_order_of_its_own(packing: Any, dataset: Dataset) -> None:
    rows = rows_of(dataset, packing=packing, seed=5)
    epochs = [[rows.examples(k) for k in range(e * rows.per_epoch, (e + 1) * rows.per_epoch)] for e in range(4)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(23)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4
    again = rows_of(dataset, packing=packing, seed=5)
    assert [again.examples(k) for k in range(3 * rows.per_epoch, 4 * rows.per_epoch)] == epochs[3]
    assert [again.examples(k) for k in range(rows.per_epoch)] == epochs[0], "backwards too"
    assert [rows_of(dataset, packing=packing, seed=6).examples(k) for k in range(rows.per_epoch)] != epochs[0]


class Numbered:
    """Rows that are their numbers."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch, self.fingerprint = per_epoch, {"data": "d"}

    def row(self, k: int) -> Batch:
        return Batch(*[np.array([k])] * 3)

    def empty(self) -> Batch:
        return Batch(*[np.array([-1])] * 3)

    def with_seed(self, seed: int) -> "Numbered":
        assert seed == 0
        return self


def ranks(per_epoch: int, local: int, world: int, kind: Any = TrainingOrder) -> list[Any]:
    rows: Any = Numbered(per_epoch)
    return [kind(rows, local_batch=local, crew=Crew(rank, world)) for rank in range(world)]


def step(orders: list[Any], accumulation: int = 1) -> list[int]:
    """The rows of one optimizer step, in order."""
    return [k for _ in range(accumulation) for order in orders for k in next(order).input[:, 0].tolist()]


def test_ranks_local_batch_and_accumulation_make_the_same_global_batches() -> None:
    layouts = [((4, 1), 1), ((2, 2), 1), ((1, 4), 1), ((2, 1), 2), ((1, 2), 2), ((1, 1), 4)]
    for (local, world), accumulation in layouts:
        orders = ranks(7, local, world)
        assert [step(orders, accumulation) for _ in range(5)] == [list(range(4 * i, 4 * i + 4)) for i in range(5)]
        assert {order.consumed for order in orders} == {20} and orders[0].epoch == 20 / 7


LAYOUTS = [(1, 1), (3, 1), (1, 2), (2, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_resume_on_other_dp_each_row_is_seen_once_after_any_row(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    for steps in range(15):
        orders = ranks(7, *before)
        seen = [k for _ in range(steps) for k in step(orders)]
        [state] = {str(order.state_dict()): order.state_dict() for order in orders}.values()
        assert state == {"rows": len(seen), "fingerprint": {"data": "d"}}
        orders = ranks(7, *after)
        for order in orders:
            order.load_state_dict(state)
        while len(seen) < 40:
            seen += step(orders)
        assert seen == list(range(len(seen)))


def test_resumed_rows_are_those_of_the_run_that_went_on(dataset: Dataset) -> None:
    def orders(local: int, world: int) -> list[TrainingOrder]:
        return [TrainingOrder(rows_of(dataset), local_batch=local, crew=Crew(rank, world)) for rank in range(world)]

    whole = orders(1, 1)[0]
    expected = [next(whole).input[0].tolist() for _ in range(24)]
    for cut in range(0, 12, 2):
        first, then = orders(1, 2), orders(2, 2)
        seen = [next(order).input[0].tolist() for _ in range(cut // 2) for order in first]
        for order in then:
            order.load_state_dict(first[0].state_dict())
        while len(seen) < 20:
            seen += [row for order in then for row in next(order).input.tolist()]
        assert seen == expected[: len(seen)]
    assert len(expected) > 2 * whole.rows.per_epoch


def test_a_state_of_other_rows_is_refused_with_what_differs(dataset: Dataset, tmp_path: Path) -> None:
    order = TrainingOrder(rows_of(dataset), local_batch=1, crew=Crew())
    next(order)
    state = order.state_dict()
    other_data = built(write_lines(tmp_path / "x.jsonl", conversations(22)), tmp_path / "cache").dataset()
    side = built(tmp_path / "x.jsonl", tmp_path / "cache").split(0.5)[0]
    other_template = SimpleNamespace(**vars(dataset), __len__=None)
    other_template.fingerprint = {**dataset.fingerprint, "template": "other"}
    digest = rf"\(digest {dataset.fingerprint['data']}, now {other_data.fingerprint['data']}\)"
    for rows, differs in [
        (rows_of(other_data), rf"the data files {digest}"),
        (rows_of(side), rf"the data files {digest}; validation_split \(None, now 0\.5\); side \(None, now training\)"),
        (
            rows_of(other_template),
            r"the tokenizer, chat\.template, template_args, date or train_on \(digest \w+, now other\)",
        ),
        (rows_of(dataset, seed=1), r"seed \(0, now 1\)"),
        (rows_of(dataset, packing="none", seq_len=31), r"row_len \(30, now 31\); packing \(documents, now none\)"),
    ]:
        with pytest.raises(ValueError, match=rf"What differs: {differs}\. Restore these to go on, or start a run of"):
            TrainingOrder(rows, local_batch=1, crew=Crew()).load_state_dict(state)
    for wrong in ({}, {"rows": -1, "fingerprint": {}}, {"rows": 1.0, "fingerprint": {}}, {"tokens": [1]}):
        with pytest.raises(ValueError, match=r"The data's state in the checkpoint has .*not of chat data"):
            order.load_state_dict(wrong)
    assert order.state_dict() == state
    order.load_state_dict(TrainingOrder(rows_of(dataset, pad_id=3), local_batch=7, crew=Crew(1, 2)).state_dict())
    assert order.consumed == 0


@pytest.mark.parametrize(("local", "world"), [(1, 1), (2, 3), (4, 2), (5, 4)])
def test_validation_hang_with_unequal_ranks_all_have_equally_many_batches_and_each_row_once(
    local: int, world: int
) -> None:
    orders = ranks(7, local, world, ValidationOrder)
    visits = [[[batch.input[:, 0].tolist() for batch in order] for order in orders] for _ in range(2)]
    assert visits[0] == visits[1]
    assert {len(batches) for batches in visits[0]} == {len(orders[0])} == {-(-7 // (local * world))}
    numbers = [k for batches in visits[0] for batch in batches for k in batch]
    assert sorted(k for k in numbers if k >= 0) == list(range(7))
    assert all(len(batch) == local for batches in visits[0] for batch in batches)


def test_validation_has_one_order_whatever_the_seed_and_its_filling_has_no_labels(dataset: Dataset) -> None:
    visits = [list(ValidationOrder(rows_of(dataset, seed=seed), local_batch=4, crew=Crew(1, 2))) for seed in (0, 7)]
    assert [b.input.tolist() for b in visits[0]] == [b.input.tolist() for b in visits[1]]
    empty = rows_of(dataset).empty()
    assert set(empty.input) == {PAD} and set(empty.label) == {IGNORED} and set(empty.documents) == {0}
    per_epoch = rows_of(dataset).per_epoch
    filled = [row for b in visits[0] for row in b.label.tolist() if set(row) == {IGNORED}]
    assert len(filled) == sum(k >= per_epoch for n in range(len(visits[0])) for k in range(8 * n + 4, 8 * n + 8)) > 0


def test_epochs_become_steps_rounded_up() -> None:
    assert steps_for(1, rows_per_epoch=10, global_batch=4) == 3
    assert steps_for(2, rows_per_epoch=10, global_batch=4) == 5
    assert steps_for(0.1, rows_per_epoch=30, global_batch=1) == 3
    assert steps_for(1e-9, rows_per_epoch=30, global_batch=8) == 1
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"chat\.epochs is"):
            steps_for(wrong, rows_per_epoch=3, global_batch=1)
