"""torchtitan 0.3's trainer for a model with adapters, and the config of such a job."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.linear import Linear
from torchtitan.trainer import Trainer

from lora_converter.run.job import Job, RunConfig
from lora_converter.tensor_parallel import sum_partial_gradients
from lora_converter.titan03.checkpoint import LoRACheckpointManager
from lora_converter.titan03.checks import check_has_no_adapters, check_settings
from lora_converter.titan03.conversations import ChatTrainer
from lora_converter.titan03.conversations import chat as chat
from lora_converter.titan03.model import made_of, unfuse_qkv, with_adapters
from lora_converter.titan03.optimizer import LoRAOptimizers
from lora_converter.titans import job
from lora_converter.titans.checks import refuse_other_class
from lora_converter.titans.compiling import compiles, first_step_told
from lora_converter.titans.selective_ac import ask_about_products


class LoRATrainer(ChatTrainer):
    """torchtitan's, of a model with adapters."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChatTrainer.Config):
        """torchtitan's, with the options of `[lora]`."""

        lora: RunConfig = field(default_factory=RunConfig)

        def maybe_log(self) -> None:
            """torchtitan's, which it calls once ranks can talk, before anything is built: the place to refuse."""
            check_settings(self)
            Trainer.Config.maybe_log(self)

    def __init__(self, config: Any):  # a Config; torchtitan has no types
        model = copy.deepcopy(config.model_spec.model)  # the caller may build from it again
        unfuse_qkv(model)
        config = replace(config, model_spec=replace(config.model_spec, model=model))
        self._groups_left = 0
        super().__init__(
            replace(
                config,
                model_spec=replace(config.model_spec, model=with_adapters(lambda: job_of(config), config)),
                checkpoint=_as(LoRACheckpointManager.Config, config.checkpoint),
                optimizer=_as(LoRAOptimizers.Config, config.optimizer),
            )
        )
        for part in self.model_parts:
            ask_about_products(part)
        if compiles(config):
            self.__dict__["train_step"] = first_step_told(self.train_step)

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
    refuse_other_class(config, Trainer.Config, ChatTrainer.Config, instead=LoRATrainer.Config)
    training = replace(config.training, disable_cuda_graphs=True)  # not tried; and dropout is seeded in each forward
    return cast(LoRATrainer.Config, made_of(LoRATrainer.Config, config, training=training, lora=RunConfig(**settings)))


def job_of(config: Any) -> Job:
    """The job that a config describes."""
    spec, data = config.model_spec, job.data_of(config.dataloader, config.training, config.debug.seed)
    folders = dict(dump_folder=config.dump_folder, assets=config.hf_assets_path)
    linears = {type(linear) for _, linear, *_ in spec.model.traverse(Linear.Config)}
    others = sorted(c.__qualname__ for c in linears if "torchtitan.models" not in c.__module__)  # quantized, say
    return job.job_of(config, **folders, model=spec.name, flavor=spec.flavor, data=data, converters=tuple(others))


def _as(config_class: Any, config: Any) -> Any:
    """The same settings, of a class that builds ours."""
    if isinstance(config, config_class):
        return config
    refuse_other_class(config, CheckpointManager.Config, OptimizersContainer.Config, instead=config_class)
    return made_of(config_class, config)
