"""A job on conversations, killed at six moments and each time continued on another layout, loses and doubles no row."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_inside import Inside
from chat_job import chat_options
from forked_job import ForkedJob, make_base
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.testing import assert_close

pytestmark = pytest.mark.slow

COUNT, PER_EPOCH, BATCH, STEPS = 17, 6, 4, 8
"""Conversations, their rows, rows of a step, and steps of the job: five epochs, which end in steps 2, 3, 5, 6 and 8."""

OPTIONS = (
    *("--lora.rank=4", "--checkpoint.interval=2", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"),
    *("--training.global_batch_size=4", "--chat.epochs=5"),
    "--optimizer.eps=1e-5",  # its default turns rounding of gradients near zero into steps of full size
)
LAYOUTS = {
    "1 rank": (1, 1, []),
    "FSDP2": (2, 2, ["--parallelism.data_parallel_shard_degree=2"]),
    "DDP2": (2, 2, ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]),
    "TP2": (2, 1, ["--parallelism.tensor_parallel_degree=2"]),
}
"""Ranks, how many of them see different rows, options."""

KILLS = (
    ("while the cache is built", "FSDP2", "encode", 5, 0),
    ("after the cache, before step 1", "1 rank", "enter", 1, 0),
    ("between two saves", "DDP2", "leave", 3, 0),
    ("during a save", "TP2", "save", 1, 2),  # its first save is that of step 4
    ("just before an epoch's end", "FSDP2", "leave", 5, 2),
    ("just after an epoch's end", "1 rank", "enter", 7, 4),
)
"""When, on which layout, where (see `Inside`), and after which step that launch goes on."""

END = ("TP2", 6)
"""The last launch."""


class Job:
    """One job over all its launches."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self._options, self._launches = folder, options, 0

    def launch(self, layout: str, place: str = "", number: int = 0) -> dict[int, list[Any]]:
        """Runs until it is killed or over; the rows of each step, in their global order."""
        ranks, degree, parallel = LAYOUTS[layout]
        local = f"--training.local_batch_size={BATCH // degree}"
        job = ForkedJob(self.folder, ranks, "debug_lora.toml", [*self._options, *parallel, local])
        self._launches += 1
        inside = Inside(self.folder / f"rows-{self._launches}", place, number)
        job.launch(inside=inside)
        if place:
            job.wait_for_death()
        else:
            job.end()
        self.log = job.text()
        lines = [json.loads(line) for file in inside.record.iterdir() for line in file.read_text().splitlines()]
        parts = {(line["step"], line["data_rank"]): line["rows"] for line in lines}
        assert len(parts) == len(lines) * degree // ranks
        steps = sorted({step for step, _ in parts})
        return {step: [row for part in range(degree) for row in parts.get((step, part), ())] for step in steps}

    def adapter(self) -> dict[str, Any]:
        return load_file(self.folder / "checkpoint" / f"step-{STEPS}" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that say their numbers."""
    folder = tmp_path_factory.mktemp("chat") / "data"
    chat_options(folder)
    records = [
        [{"role": "user", "content": f"#{i}#" + " cat" * (i % 5)}, {"role": "assistant", "content": " dog" * (i % 7)}]
        for i in range(COUNT)
    ]
    lines = [json.dumps({"messages": messages}) for messages in records]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def conversations(rows: list[Any], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The numbers that each row's documents say."""
    for ids, documents in rows:
        pairs = list(zip(ids, documents, strict=True))
        texts = [
            tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
            for document, run in itertools.groupby(pairs, lambda pair: pair[1])
            if document
        ]
        yield [int(number) for text in texts for number in re.findall(r"#(\d+)#", text)]


def test_killed_at_six_moments_and_continued_on_another_layout_each_row_is_trained_once_per_epoch(
    data: Path, tmp_path: Path
) -> None:
    options = [*chat_options(data, seq_len=128), f"--checkpoint.initial_load_path={make_base(tmp_path / 'base')}"]
    killed = Job(tmp_path / "killed", [*OPTIONS, *options, f"--chat.cache_path={tmp_path}/cache"])
    counts: dict[int, list[Any]] = {}
    for moment, layout, place, number, start in KILLS:
        trained = killed.launch(layout, place, number)
        assert min(trained, default=start + 1) == start + 1, (moment, trained.keys(), start)
        built = list((tmp_path / "cache").glob("*-*-*/whole/tokens"))
        assert bool(built) is (moment != KILLS[0][0])
        assert f"an epoch is {-(-PER_EPOCH // BATCH)} steps" in killed.log or not built
        counts = {step: rows for step, rows in counts.items() if step <= start} | trained
    layout, start = END
    trained = killed.launch(layout)
    assert list(trained) == list(range(start + 1, STEPS + 1))
    counts = {step: rows for step, rows in counts.items() if step <= start} | trained
    assert list(counts) == list(range(1, STEPS + 1)) and {len(rows) for rows in counts.values()} == {BATCH}

    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    seen = list(conversations([row for rows in counts.values() for row in rows], tokenizer))
    epochs = [seen[first : first + PER_EPOCH] for first in range(0, len(seen), PER_EPOCH)]
    for epoch in epochs[:-1]:
        assert Counter(itertools.chain(*epoch)) == Counter(range(COUNT)), epoch
    assert len(epochs) == 6 and max(Counter(itertools.chain(*epochs[-1])).values()) == 1

    whole = Job(tmp_path / "whole", [*OPTIONS, *options, f"--chat.cache_path={tmp_path}/cache"])
    assert whole.launch("1 rank") == counts
    assert_close(killed.adapter(), whole.adapter(), rtol=1e-4, atol=1e-6)  # fp32, sums in other orders
