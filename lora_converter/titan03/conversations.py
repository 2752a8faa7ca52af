"""Conversations for torchtitan 0.3's trainer: `chat(config, "train.jsonl", epochs=2)`; `--chat.*` on the command line.

0.3 makes document masks of `positions`, which begin at 0 where a document does.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from lora_converter.chat.crew import Crew
from lora_converter.chat.settings import ChatConfig
from lora_converter.titan03.model import made_of
from lora_converter.titans import chat as titans
from lora_converter.titans import chat_data
from lora_converter.titans.chat_data import ChatData, Conversations, Files
from lora_converter.titans.checks import refuse_other_class


class ChatLoader(titans.ChatLoader, BaseDataLoader):
    """Batches of rows for torchtitan: {"input", "positions"} and labels. A `ChatTrainer` says of what."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Files of conversations."""

        dataset: str = chat_data.CHAT
        infinite: bool = True  # set by the validator, whose rows end all the same
        _batches: Annotated[chat_data.Batches, tyro.conf.Suppress] = chat_data.no_batches

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any):
        super().__init__(*config._batches(Crew(dp_rank, dp_world_size), local_batch_size))

    def __iter__(self) -> Iterator[titans.Batch]:
        return (titans.as_tensors(batch, positions=batch.positions) for batch in self.order)


class ChatTrainer(Trainer):
    """torchtitan's, which reads conversations before it builds what depends on them."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """torchtitan's, with the options of `[chat]`."""

        chat: ChatConfig = field(default_factory=ChatConfig)

    def __init__(self, config: Config):
        super().__init__(config)
        if isinstance(self.dataloader, ChatLoader):
            self.metrics_processor.log = self.dataloader.log_beside(self.metrics_processor.log)

    def init_distributed(self) -> ParallelDims:
        """torchtitan's; from here on all ranks can read together."""
        dims, config = super().init_distributed(), self.config
        if isinstance(config.dataloader, ChatLoader.Config):
            data, validator = ChatData(_conversations(config)), config.validator
            data.begin(config.training, dims.dp_replicate * dims.dp_shard)
            config.dataloader = replace(config.dataloader, _batches=data.batches)
            own = isinstance(validator.dataloader, ChatLoader.Config)
            if validator.enable and (own or data.validation is not None):
                local, rows = config.training.local_batch_size, data.validation_rows()
                batches = functools.partial(chat_data.validation_batches, rows, local)
                validator.dataloader = replace(validator.dataloader if own else ChatLoader.Config(), _batches=batches)
        return dims


def chat(config: Trainer.Config, dataset_path: str, **settings: Any) -> Any:
    """The config of another job, with adapters or without, on conversations; `settings` are those of `ChatConfig`."""
    takes_them = type(config) if isinstance(config, ChatTrainer.Config) else ChatTrainer.Config
    refuse_other_class(config, Trainer.Config, takes_them, instead=ChatTrainer.Config)
    own = dict(dataloader=ChatLoader.Config(dataset_path=dataset_path), chat=ChatConfig(**settings))
    return made_of(takes_them, config, **own)


def _conversations(config: Any) -> Conversations:
    length, validation = config.training.seq_len, config.validator.dataloader
    own = validation.dataset_path if isinstance(validation, ChatLoader.Config) else None
    return Conversations(
        chat=config.chat,
        training=Files(config.dataloader.dataset_path, length, "dataloader.dataset_path", "training.seq_len"),
        validation=Files(own, length, "validator.dataloader.dataset_path", "training.seq_len"),
        **dict(assets=config.hf_assets_path, folder=config.dump_folder, seed=config.debug.seed or 0),
        vocab_size=config.model_spec.model.vocab_size,
    )
