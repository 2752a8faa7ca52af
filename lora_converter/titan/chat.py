"""`training.dataset = "chat"`: conversations for torchtitan's trainer, through whatever TrainSpec the model has.

The spec is copied for each job. Its loader builder, the first thing that sees the job, reads the conversations and
puts in what else they take: FlexAttention with a document mask, a validator of their own, metrics. For any other
dataset the copy does what the spec does.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import build_metrics_processor

from lora_converter.chat.crew import Crew
from lora_converter.chat.order import ValidationOrder
from lora_converter.chat.rows import Batch as Rows
from lora_converter.titan.chat_validation import ChatValidator
from lora_converter.titan.documents import DOCUMENTS, flex_arguments, with_document_masks
from lora_converter.titan.new_tokens import has_rows_for_all, new_tokens_of
from lora_converter.titans import chat
from lora_converter.titans.chat import Batch
from lora_converter.titans.chat_data import CHAT, ChatData, Conversations, Files


def offer_chat(get_train_spec: Callable[[str], Any]) -> Callable[[str], Any]:
    """`get_train_spec`, whose specs take `training.dataset = "chat"`, the user's own included."""

    @functools.wraps(get_train_spec)
    def get_with_chat(name: str) -> Any:
        spec = get_train_spec(name)
        return spec if spec.build_dataloader_fn is None else _with_chat(spec)

    return get_with_chat


def _with_chat(spec: Any) -> Any:
    job_spec = dataclasses.replace(spec)

    def build_dataloader(*, job_config: Any, dp_world_size: int, dp_rank: int, **kwargs: Any) -> Any:
        validates = job_config.validation.enable and validates_on_chat(job_config)
        if job_config.training.dataset.lower() != CHAT:
            if validates:
                raise ValueError('validation.dataset = "chat" is for jobs with training.dataset = "chat".')
            sizes = dict(dp_world_size=dp_world_size, dp_rank=dp_rank)
            return spec.build_dataloader_fn(job_config=job_config, **sizes, **kwargs)
        job = ChatJob(job_config, spec, Crew(dp_rank, dp_world_size))
        job.change(job_spec, validates=validates)
        return job.loader

    job_spec.build_dataloader_fn = build_dataloader
    return job_spec


class ChatJob:
    """What a job on conversations changes of the trainer.

    Args:
        data_ranks: The ranks that see different rows, and which of them this is.

    Raises:
        ValueError: On all ranks, as `ChatData`, and for a model without a document mask.
    """

    def __init__(self, job_config: Any, spec: Any, data_ranks: Crew):
        self.job_config, self.spec, self._data_ranks = job_config, spec, data_ranks
        self._model_args = spec.model_args[job_config.model.flavor]
        if not hasattr(job_config, "chat"):
            raise ValueError(
                'training.dataset = "chat", and there is no [chat] section: derive your job.custom_config_module from '
                "lora_converter.titan.JobConfig, or name lora_converter.titan there."
            )
        self.documents = job_config.chat.packing == "documents"
        if self.documents:
            self._flex = flex_arguments(self._model_args, job_config)
        self.data = ChatData(conversations_of(job_config, self._model_args))
        training = job_config.training
        self.loader = ChatLoader(*self.data.batches(data_ranks, training.local_batch_size))
        self.data.begin(training, data_ranks.world)

    def change(self, job_spec: Any, *, validates: bool) -> None:
        """Puts into the job's spec what conversations take.

        Args:
            validates: `validation.dataset` is "chat".
        """
        validation = self.job_config.validation
        if self.documents:
            job_spec.model_args = {**self.spec.model_args, self.job_config.model.flavor: self._flex}
            job_spec.model_cls = with_document_masks(self.spec.model_cls)
        if validation.enable and (validates or self.data.validation is not None):
            rows = self.data.validation_rows()
            order = ValidationOrder(rows, local_batch=validation.local_batch_size, crew=self._data_ranks)
            batches = functools.partial(_validation_batches, order, validation.steps, self.documents)
            job_spec.build_validator_fn = lambda **kwargs: ChatValidator(batches, **kwargs)
        job_spec.build_metrics_processor_fn = self._build_metrics

    def _build_metrics(self, *args: Any, **kwargs: Any) -> Any:
        processor = (self.spec.build_metrics_processor_fn or build_metrics_processor)(*args, **kwargs)
        processor.log = self.loader.log_beside(processor.log)
        return processor


class ChatLoader(chat.ChatLoader, BaseDataLoader):
    """Batches of rows for torchtitan: {"input", "documents"} and labels, (rows, seq_len) int64."""

    def __iter__(self) -> Iterator[Batch]:
        documents = self.order.rows.packing == "documents"
        for batch in self.order:
            yield _as_tensors(batch, documents=documents)


def _as_tensors(batch: Rows, *, documents: bool) -> Batch:
    return chat.as_tensors(batch, **{DOCUMENTS: batch.documents} if documents else {})


def _validation_batches(order: ValidationOrder, steps: int, documents: bool) -> Iterator[Batch]:
    for number, batch in enumerate(order):
        if number == steps:  # -1: all of them
            return
        yield _as_tensors(batch, documents=documents)


def validates_on_chat(job_config: Any) -> bool:
    """Whether the job's own files of validation are conversations."""
    return bool(job_config.validation.dataset.lower() == CHAT)


def conversations_of(job_config: Any, model_args: Any) -> Conversations:
    """What a job config says of its conversations.

    Args:
        model_args: torchtitan's, of the job's flavor.
    """

    def files(section: str, *, given: bool = True) -> Files:
        settings = getattr(job_config, section)
        path = settings.dataset_path if given else None
        return Files(path, settings.seq_len, f"{section}.dataset_path", f"{section}.seq_len")

    return Conversations(
        chat=job_config.chat,
        training=files("training"),
        validation=files("validation", given=validates_on_chat(job_config)),
        assets=job_config.model.hf_assets_path,
        folder=job_config.job.dump_folder,
        seed=job_config.debug.seed or 0,
        vocab_size=None if has_rows_for_all(job_config) else getattr(model_args, "vocab_size", None),
        new_tokens=tuple(new_tokens_of(job_config)),
    )
