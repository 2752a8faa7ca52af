"""torchtitan 0.3 has a loader of conversations as well. What it does otherwise than ours, tried by running both."""

import json
import random
from pathlib import Path
from typing import Any

import jobs03  # noqa: F401  before torchtitan
import pytest
import torch
from chat_job import TEMPLATE, WORDS, chat_options
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import ChatDataLoader

from lora_converter.chat.cache import build
from lora_converter.chat.crew import Crew
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.order import TrainingOrder
from lora_converter.chat.parts import Limit
from lora_converter.chat.rows import Rows

LENGTH, COUNT = 128, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and conversations of one turn."""
    folder = tmp_path_factory.mktemp("own") / "chat"
    chat_options(folder)
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))

    pairs = [[{"role": role, "content": text()} for role in ("user", "assistant")] for _ in range(COUNT)]
    (folder / "single.jsonl").write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in pairs))
    return folder


def torchtitans(folder: Path, file: str = "single.jsonl", *, rank: int = 0, world: int = 1, rows: int = 1) -> Any:
    config = ChatDataLoader.Config(
        dataset_path="json",
        load_dataset_kwargs=dict(data_files=str(folder / file), split="train"),
        sample_processor=lambda record: record["messages"],
        infinite=False,
    )
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(folder / "tokenizer"))
    return config.build(dp_world_size=world, dp_rank=rank, tokenizer=tokenizer, seq_len=LENGTH, local_batch_size=rows)


def ours(folder: Path, file: str = "single.jsonl") -> Rows:
    encoder = ChatTokenizer(folder / "tokenizer")
    limit = Limit(LENGTH, "drop", "training.seq_len")
    data = build(str(folder / file), encoder, folder=folder / "cache", limit=limit, crew=Crew()).dataset()
    return Rows(data, seq_len=LENGTH)


def trained_by_both(folder: Path) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """Trained tokens of each conversation, theirs and ours, in some order, and the rows of theirs."""
    theirs, rows = [], []
    for inputs, labels in torchtitans(folder):
        rows.append(inputs["input"][0])
        begins = (inputs["positions"][0] == 0).nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], LENGTH], strict=True):
            own = labels[0, begin:end]
            if (own != -100).any():  # else padding, a document of its own
                theirs.append(own[own != -100].tolist())
    examples = [ours(folder).dataset.example(number) for number in range(COUNT)]
    return theirs, [ids[trained].tolist() for ids, trained in examples], rows


def test_it_trains_the_same_tokens_of_one_turn_and_packs_them_into_more_rows(folder: Path) -> None:
    theirs, own, rows = trained_by_both(folder)
    assert sorted(theirs) == sorted(own) and len(theirs) == COUNT
    assert len(rows) > 1.1 * ours(folder).per_epoch, (len(rows), ours(folder).per_epoch)


def test_it_begins_a_conversation_twice_where_the_template_writes_the_first_token(folder: Path) -> None:
    assert "<bos>" in TEMPLATE
    inputs, _ = next(iter(torchtitans(folder)))
    assert inputs["input"][0, :3].eq(0).tolist() == [True, True, False]
    assert (ours(folder).row(0).input[:3] == 0).tolist() == [True, False, False]


def test_it_takes_one_question_and_one_answer_alone(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected single-turn \[user, assistant\], got 4 messages"):
        list(torchtitans(folder, "train.jsonl"))
    counts = ours(folder, "train.jsonl").dataset.counts
    assert counts.conversations + counts.too_long_dropped == 120 and counts.conversations > 60


def test_its_rows_depend_on_how_many_ranks_read_them(folder: Path) -> None:
    (one, _), *_ = torchtitans(folder, rows=2)
    two = torch.cat([next(iter(torchtitans(folder, rank=rank, world=2)))[0]["input"] for rank in range(2)])
    assert not torch.equal(one["input"], two)
    halves = [next(TrainingOrder(ours(folder), local_batch=1, crew=Crew(rank, 2))).input for rank in range(2)]
    whole = next(TrainingOrder(ours(folder), local_batch=2, crew=Crew())).input
    assert (whole == [half[0] for half in halves]).all()


def test_it_does_not_go_on_with_another_number_of_ranks(folder: Path) -> None:
    loader = torchtitans(folder)
    next(iter(loader))
    with pytest.raises(AssertionError, match="dataloader resharding is not supported yet"):
        torchtitans(folder, world=2).load_state_dict(loader.state_dict())
