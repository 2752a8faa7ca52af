"""`training.dataset = "chat"`: conversations for torchtitan's trainer, through whatever TrainSpec the model has.

The spec is copied for each job. Its loader builder, the first thing that sees the job, reads the conversations and
puts in what else they take: FlexAttention with a document mask, a validator of their own, metrics. For any other
dataset the copy does what the spec does.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import build_metrics_processor
from torchtitan.tools.logging import logger

from lora_converter.chat import rows as chat_rows
from lora_converter.chat.crew import Crew
from lora_converter.chat.order import TrainingOrder, ValidationOrder
from lora_converter.chat.rows import Rows, steps_for
from lora_converter.titan.chat_data import ChatData
from lora_converter.titan.chat_validation import Batch, ChatValidator
from lora_converter.titan.documents import DOCUMENTS, flex_arguments, with_document_masks
from lora_converter.titan.job import CHAT


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
        validates = job_config.validation.enable and job_config.validation.dataset.lower() == CHAT
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
        self.data = ChatData(job_config, self._model_args)
        training = job_config.training
        self.loader = ChatLoader(self.data.rows, training.local_batch_size, data_ranks, self.data.encoder.added_tokens)
        global_batch = training.global_batch_size
        if global_batch < 0:
            global_batch = training.local_batch_size * data_ranks.world
        if job_config.chat.epochs:
            rows = self.data.rows.per_epoch
            training.steps = steps_for(job_config.chat.epochs, rows_per_epoch=rows, global_batch=global_batch)
        logger.info(self.data.describe(global_batch))

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
            rows = self.data.validation_rows(own_path=validates)
            order = ValidationOrder(rows, local_batch=validation.local_batch_size, crew=self._data_ranks)
            batches = functools.partial(_validation_batches, order, validation.steps, self.documents)
            job_spec.build_validator_fn = lambda **kwargs: ChatValidator(batches, **kwargs)
        job_spec.build_metrics_processor_fn = self._build_metrics

    def _build_metrics(self, *args: Any, **kwargs: Any) -> Any:
        processor = (self.spec.build_metrics_processor_fn or build_metrics_processor)(*args, **kwargs)
        log = processor.log

        def log_with_chat(*values: Any, extra_metrics: dict[str, Any] | None = None, **options: Any) -> None:
            log(*values, extra_metrics={**(extra_metrics or {}), **self.loader.metrics()}, **options)

        processor.log = log_with_chat
        return processor


class ChatLoader(BaseDataLoader):
    """Batches of rows for torchtitan: {"input", "documents"} and labels, (rows, seq_len) int64.

    Its state is the number of rows that all ranks have consumed, and what they are made of, so that any layout goes on.

    Args:
        added: Id -> text of the tokenizer's added tokens.
    """

    def __init__(self, rows: Rows, local_batch: int, data_ranks: Crew, added: dict[int, str]):
        self.order = TrainingOrder(rows, local_batch=local_batch, crew=data_ranks)
        self._logged, self._added = 0, added

    def __iter__(self) -> Iterator[Batch]:
        documents = self.order.rows.packing == "documents"
        for batch in self.order:
            yield as_tensors(batch, documents=documents)

    def metrics(self) -> dict[str, float]:
        """Of the rows of all ranks since the last call.

        Returns:
            `chat/epoch`: how often the data have been seen; `chat/trained_tokens`: what the loss was over; `chat/fill`:
            the share of positions that are no padding, which torchtitan's tokens per second and MFU count as well.
        """
        order, dataset = self.order, self.order.rows.dataset
        examples = [order.rows.examples(k) for k in range(self._logged, order.consumed)]
        self._logged = order.consumed
        trained, filled = (sum(map(count, examples)) for count in (dataset.count_trained, dataset.count_inputs))
        positions = max(len(examples), 1) * order.rows.seq_len
        return {"chat/epoch": order.epoch, "chat/trained_tokens": trained, "chat/fill": filled / positions}

    def trained_special_tokens(self) -> dict[int, str]:
        """Those of the added tokens that the loss is over, in the first examples, which are like the others in that."""
        dataset, seen = self.order.rows.dataset, set[int]()
        for number in range(min(len(dataset), 1000)):
            ids, trained = dataset.example(number)
            seen.update(ids[trained].tolist())
        return {index: text for index, text in self._added.items() if index in seen}

    def state_dict(self) -> dict[str, Any]:
        """The same on all ranks."""
        state = self.order.state_dict()
        return {"rows": state["rows"], "fingerprint": json.dumps(state["fingerprint"], sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `TrainingOrder.load_state_dict`."""
        if not state_dict:
            return
        self.order.load_state_dict({**state_dict, "fingerprint": json.loads(state_dict["fingerprint"])})
        self._logged = self.order.consumed


def as_tensors(batch: chat_rows.Batch, *, documents: bool) -> Batch:
    """A batch as torchtitan takes it."""
    inputs = {"input": torch.from_numpy(batch.input)}
    if documents:
        inputs[DOCUMENTS] = torch.from_numpy(batch.documents)
    return inputs, torch.from_numpy(batch.label)


def _validation_batches(order: ValidationOrder, steps: int, documents: bool) -> Iterator[Batch]:
    for number, batch in enumerate(order):
        if number == steps:  # -1: all of them
            return
        yield as_tensors(batch, documents=documents)
