"""torchtitan 0.3's trainer for a model with adapters, and the config of such a job."""

import copy
import functools
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.trainer import Trainer

from lora_converter.run.job import Job, RunConfig
from lora_converter.tensor_parallel import sum_partial_gradients
from lora_converter.titan03.checkpoint import LoRACheckpointManager
from lora_converter.titan03.checks import check_has_no_adapters, check_settings
from lora_converter.titan03.conversations import ChatLoader, ChatTrainer
from lora_converter.titan03.model import made_of, unfuse_qkv, with_adapters
from lora_converter.titan03.optimizer import LoRAOptimizers
from lora_converter.titans import job
from lora_converter.titans.chat_data import CHAT
from lora_converter.titans.compiling import compiles, first_step_told
from lora_converter.titans.selective_ac import ask_about_products, check_masks_are_kept


class LoRATrainer(ChatTrainer):
    """torchtitan's, of a model with adapters."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChatTrainer.Config):
        """torchtitan's, with the options of `[lora]`."""

        lora: RunConfig = field(default_factory=RunConfig)

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)

        def maybe_log(self) -> None:
            """torchtitan's, which it calls once ranks can talk, before anything is built: the place to refuse."""
            check_settings(self)
            Trainer.Config.maybe_log(self)

    def __init__(self, config: Any):  # a Config; torchtitan has no types
        spec = config.model_spec
        assert spec is not None
        check_masks_are_kept(config.lora.dropout, config.activation_checkpoint)
        model = copy.deepcopy(spec.model)  # the caller may build from it again
        unfuse_qkv(model)
        config = replace(config, model_spec=replace(spec, model=model))
        self._groups_left = 0
        super().__init__(
            replace(
                config,
                model_spec=replace(spec, model=with_adapters(functools.partial(job_of, config), config)),
                checkpoint=_as(LoRACheckpointManager.Config, config.checkpoint),
                optimizer=_as(LoRAOptimizers.Config, config.optimizer),
            )
        )
        for part in self.model_parts:
            ask_about_products(part)
        if compiles(config):
            vars(self)["train_step"] = first_step_told(self.train_step)

    def train_step(self, data_iterator: Any) -> None:
        """torchtitan's, on gradients that are complete before they are clipped."""
        self._groups_left = self.gradient_accumulation_steps
        super().train_step(data_iterator)

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """torchtitan's; after the last of a step partial gradients are summed."""
        loss = super().forward_backward_step(**kwargs)
        self._groups_left -= 1
        if self._groups_left == 0:
            sum_partial_gradients(param for part in self.model_parts for param in part.parameters())
        return loss


def lora(config: Trainer.Config, **settings: Any) -> LoRATrainer.Config:
    """The config of a job that trains adapters on the model of another.

    Args:
        config: Of torchtitan's registry, or like one.
        settings: Of `[lora]`, see `RunConfig`; `--lora.*` on the command line.

    Raises:
        ValueError: A setting is wrong, or the model has adapters already.
    """
    check_has_no_adapters(config)
    return cast(LoRATrainer.Config, made_of(LoRATrainer.Config, config, lora=RunConfig(**settings)))


def job_of(config: LoRATrainer.Config) -> Job:
    """The job that a config describes."""
    spec, checkpoint = config.model_spec, config.checkpoint
    assert spec is not None and isinstance(checkpoint, CheckpointManager.Config)
    return Job(
        model=spec.name,
        flavor=spec.flavor,
        config=config.lora,
        seed=config.debug.seed or 0,
        steps=config.training.steps,
        folder=os.path.join(config.dump_folder, checkpoint.folder),
        base=job.base_of(checkpoint, config.hf_assets_path),
        **job.results_of(checkpoint),
        data={"training.dataset": CHAT} if isinstance(config.dataloader, ChatLoader.Config) else _data_of(config),
    )


def _data_of(config: LoRATrainer.Config) -> dict[str, Any]:
    """What batches are made of, option -> value. A loader's own options are compared as they are written."""
    loader, training = config.dataloader, config.training
    options = {f"dataloader.{field.name}": getattr(loader, field.name) for field in fields(loader)}
    options = {name: value if isinstance(value, (str, int)) else str(value) for name, value in options.items()}
    return {
        **options,
        "dataloader": type(loader).__qualname__,
        "training.seq_len": training.seq_len,
        "training.local_batch_size": training.local_batch_size,
        "debug.seed": config.debug.seed,
    }


def _as(config_class: Any, config: Any) -> Any:
    """The same settings, of a class that builds ours."""
    assert type(config) in (CheckpointManager.Config, OptimizersContainer.Config), type(config)
    return made_of(config_class, config)
