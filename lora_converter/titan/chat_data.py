"""The conversations of a torchtitan job: from its settings to a cache and to rows."""

import datetime
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lora_converter.chat.cache import Cache, build
from lora_converter.chat.crew import Crew
from lora_converter.chat.dataset import Dataset
from lora_converter.chat.masks import ChatTokenizer
from lora_converter.chat.parts import Limit
from lora_converter.chat.rows import Rows, steps_for
from lora_converter.figures import percent
from lora_converter.ranks import together
from lora_converter.titan.new_tokens import has_rows_for_all, new_tokens_of


class ChatData:
    """The conversations of a job, as rows. Made on all ranks, which read the files together.

    Args:
        model_args: torchtitan's, of the job's flavor.

    Raises:
        ValueError: On all ranks: files or records that cannot be used, or settings that do not fit.
    """

    def __init__(self, job_config: Any, model_args: Any):
        self.job_config, self.config = job_config, job_config.chat
        vocab_size = None if has_rows_for_all(job_config) else getattr(model_args, "vocab_size", None)
        self.encoder = together(lambda: encoder_of(job_config, vocab_size))
        self.cache = self._cache("training")
        split = self.config.validation_split
        self.validation: Dataset | None = None
        if split:
            train, self.validation = self.cache.split(split)
        else:
            train = self.cache.dataset()
        self.rows = self._rows(train, job_config.training.seq_len)

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

    def validation_rows(self, *, own_path: bool) -> Rows:
        """Rows that are validated on.

        Args:
            own_path: `validation.dataset` is "chat", so that validation.dataset_path counts.
        """
        validation = self.job_config.validation
        path = validation.dataset_path if own_path else None
        if path and self.validation is not None:
            raise ValueError("chat.validation_split and validation.dataset_path are both set. Leave one of them out.")
        if path:
            return self._rows(self._cache("validation").dataset(), validation.seq_len)
        if self.validation is None:
            raise ValueError('validation.dataset = "chat": set validation.dataset_path, or chat.validation_split.')
        return self._rows(self.validation, self.job_config.training.seq_len)

    def _cache(self, section: str) -> Cache:
        """That of the files which a section names. Its name stands before what is wrong with them."""
        settings = getattr(self.job_config, section)
        if not settings.dataset_path:
            raise ValueError('training.dataset = "chat": set training.dataset_path to files of conversations.')
        folder = Path(self.config.cache_path or os.path.join(self.job_config.job.dump_folder, "chat_cache"))
        everybody = Crew(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Crew()

        def built() -> Cache:
            try:
                limit = Limit(settings.seq_len, self.config.too_long, f"{section}.seq_len")
                return build(settings.dataset_path, self.encoder, folder=folder, limit=limit, crew=everybody)
            except ValueError as error:
                raise ValueError(f"{section}.dataset_path: {error}") from error

        return together(built)

    def _rows(self, dataset: Dataset, seq_len: int) -> Rows:
        return Rows(dataset, seq_len=seq_len, seed=self.job_config.debug.seed or 0, packing=self.config.packing)


def encoder_of(job_config: Any, vocab_size: int | None = None) -> ChatTokenizer:
    """The tokenizer and template of a job.

    Args:
        vocab_size: Rows of the model's embedding.
    """
    chat = job_config.chat
    return ChatTokenizer(
        job_config.model.hf_assets_path,
        template=chat.template,
        template_args=chat.template_values,
        train_on=chat.train_on,
        date=datetime.date.fromisoformat(chat.date),
        vocab_size=vocab_size,
        new_tokens=new_tokens_of(job_config),
    )
