"""The conversations of a torchtitan job: from what it says of them, in plain values, to a cache and to rows."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torchtitan.tools.logging import logger

from lora_converter.chat.cache import Cache, build
from lora_converter.chat.crew import Crew
from lora_converter.chat.dataset import Dataset
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.order import TrainingOrder, ValidationOrder
from lora_converter.chat.parts import Limit
from lora_converter.chat.rows import Rows, steps_for
from lora_converter.chat.settings import ChatConfig
from lora_converter.figures import percent
from lora_converter.ranks import together

CHAT = "chat"
"""The dataset that is conversations."""

Batches = Callable[[Crew, int], tuple[Any, dict[int, str]]]
"""The ranks that see different rows, and how many each has in a batch -> arguments of `titans.chat.ChatLoader`."""


@dataclass(frozen=True)
class Files:
    """Conversations that a job names.

    Attributes:
        path: Files or a folder; None for none.
        seq_len: Of their rows.
        path_option: The host's name of the option that says `path`.
        length_option: And of the one that says `seq_len`.
    """

    path: str | None
    seq_len: int
    path_option: str
    length_option: str


@dataclass(frozen=True)
class Conversations:
    """What a job says of its conversations.

    Attributes:
        assets: Folder of the tokenizer.
        folder: Where the job writes; the cache is there unless `chat` says otherwise.
        vocab_size: Rows of the model's embedding; None if it gets rows for all tokens.
        new_tokens: Are added to the tokenizer.
    """

    chat: ChatConfig
    training: Files
    validation: Files
    assets: str
    folder: str
    seed: int
    vocab_size: int | None
    new_tokens: tuple[str, ...] = ()


class ChatData:
    """The conversations of a job, as rows. Made on all ranks, which read the files together.

    Raises:
        ValueError: On all ranks: files or records that cannot be used, or settings that do not fit.
    """

    def __init__(self, job: Conversations):
        self.job = job
        self.config: Any = job.chat  # of strings, which are of its choices
        self.encoder = together(lambda: _encoder(job))
        self.cache = self._cache(job.training)
        split = self.config.validation_split
        self.validation: Dataset | None = None
        if split:
            train, self.validation = self.cache.split(split)
        else:
            train = self.cache.dataset()
        self.rows = self._rows(train, job.training.seq_len)

    def describe(self, global_batch: int) -> str:
        """One line with counts.

        Args:
            global_batch: Rows of a step.
        """
        steps = steps_for(1, rows_per_epoch=self.rows.per_epoch, global_batch=global_batch)
        return (
            f"Chat: {self.rows.dataset.counts.describe()}; {self.rows.per_epoch:,} rows of {self.rows.seq_len:,}, "
            f"{percent(self.rows.fill, 1)} filled; an epoch is {steps:,} steps"
        )

    def begin(self, training: Any, ranks: int) -> None:
        """Logs counts, and sets `training.steps` if `chat.epochs` does.

        Args:
            training: That section of the host's config.
            ranks: How many see different rows.
        """
        global_batch = training.global_batch_size
        if global_batch < 0:
            global_batch = training.local_batch_size * ranks
        if self.config.epochs:
            rows = self.rows.per_epoch
            training.steps = steps_for(self.config.epochs, rows_per_epoch=rows, global_batch=global_batch)
        logger.info(self.describe(global_batch))

    def batches(self, ranks: Crew, rows: int) -> tuple[TrainingOrder, dict[int, str]]:
        """See `Batches`: those to train on."""
        return TrainingOrder(self.rows, local_batch=rows, crew=ranks), self.encoder.added_tokens

    def validation_rows(self) -> Rows:
        """Rows that are validated on: of files of their own, or those that were split off."""
        files = self.job.validation
        if files.path and self.validation is not None:
            raise ValueError(f"chat.validation_split and {files.path_option} are both set. Leave one of them out.")
        if files.path:
            return self._rows(self._cache(files).dataset(), files.seq_len)
        if self.validation is None:
            raise ValueError(f"Validation on conversations: set {files.path_option}, or chat.validation_split.")
        return self._rows(self.validation, self.job.training.seq_len)

    def _cache(self, files: Files) -> Cache:
        """That of some files. The option that names them stands before what is wrong with them."""
        path = files.path
        if not path:
            raise ValueError(f"Training on conversations: set {files.path_option} to files of conversations.")
        folder = Path(self.config.cache_path or os.path.join(self.job.folder, "chat_cache"))
        everybody = Crew(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Crew()

        def built() -> Cache:
            try:
                limit = Limit(files.seq_len, self.config.too_long, files.length_option)
                return build(path, self.encoder, folder=folder, limit=limit, crew=everybody)
            except ValueError as error:
                raise ValueError(f"{files.path_option}: {error}") from error

        return together(built)

    def _rows(self, dataset: Dataset, seq_len: int) -> Rows:
        return Rows(dataset, seq_len=seq_len, seed=self.job.seed, packing=self.config.packing)


def validation_batches(rows: Rows, local: int, ranks: Crew, part: int) -> tuple[ValidationOrder, dict[int, str]]:
    """See `Batches`: of rows that are validated on.

    Args:
        local: Rows that a rank has at a time, in batches of `part`.
    """
    return ValidationOrder(rows, local_batch=local, crew=ranks, parts=local // part), {}


def no_batches(ranks: Crew, rows: int) -> NoReturn:
    """See `Batches`: before a trainer has read conversations."""
    raise ValueError(
        "Nothing has read the conversations of this loader: make the config with lora_converter.titan03.chat()."
    )


def _encoder(job: Conversations) -> ChatTokenizer:
    chat: Any = job.chat
    return ChatTokenizer(
        job.assets,
        template=chat.template,
        template_args=chat.template_values,
        train_on=chat.train_on,
        date=datetime.date.fromisoformat(chat.date),
        vocab_size=job.vocab_size,
        new_tokens=job.new_tokens,
    )
