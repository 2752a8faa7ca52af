"""torchtitan 0.2.2's TOML files as configs of 0.3.

Sections and options keep their names where 0.3 has them. What it calls otherwise, or keeps elsewhere, is in one table;
what it has not is refused by name, with what there is in its place.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.trainer import Trainer

from lora_converter.titan03.trainer import lora

Section = Mapping[str, Any]

_SECTIONS: dict[str, tuple[type, str]] = {
    "training": (TrainingConfig, "training"),
    "parallelism": (ParallelismConfig, "parallelism"),
    "checkpoint": (CheckpointManager.Config, "checkpoint"),
    "lr_scheduler": (LRSchedulersContainer.Config, "lr_scheduler"),
    "metrics": (MetricsProcessor.Config, "metrics"),
    "compile": (CompileConfig, "compile"),
    "comm": (CommConfig, "comm"),
    "debug": (DebugConfig, "debug"),
    "validation": (Validator.Config, "validator"),
}
"""Section -> the class of 0.3 that has its options, and the field of the trainer's config that it is."""

_ELSEWHERE: dict[str, str] = {
    "job.dump_folder": "dump_folder",
    "job.description": "",
    "job.custom_config_module": "",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
}
"""Option there -> option here; what says nothing to 0.3 is left out."""

_GONE: dict[str, str] = {
    "optimizer.early_step_in_backward": "there is no such optimizer; adapters' gradients take little memory",
    "activation_checkpoint.selective_ac_option": "it is by operator; leave it out, or say 'op'",
    "parallelism.expert_tensor_parallel_degree": "experts are not sharded by features",
    "model.print_after_conversion": "print the model from a config function of yours",
}


def config_of(toml: Mapping[str, Section], path: str) -> Trainer.Config:
    """The config of the job that a TOML file describes.

    Raises:
        ValueError: 0.3 has no counterpart of an option; all such are named, with what it has.
    """
    left = {f"{s}.{o}": value for s, options in toml.items() for o, value in options.items() if s != "lora"}
    take = _Taker(left)
    model, flavor = take("model.name"), take("model.flavor")
    spec = importlib.import_module(f"torchtitan.models.{model}").model_registry(flavor)
    converters = take("model.converters", [])
    config = Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))),
        optimizer=_optimizer(take),
        activation_checkpoint=_activation_checkpointing(take),
        dataloader=HuggingFaceTextDataLoader.Config(
            dataset=take("training.dataset", "c4_test"), dataset_path=take("training.dataset_path", None)
        ),
    )
    for option, here in _ELSEWHERE.items():
        if option in left:
            value = take(option)
            if here:
                _set(config, here, value)
    for section, (section_class, name) in _SECTIONS.items():
        known = {f.name for f in fields(section_class) if f.init}
        for option in [option for option in left if option.startswith(f"{section}.")]:
            if option.partition(".")[2] in known:
                _set(config, f"{name}.{option.partition('.')[2]}", take(option))
    path_of_base = config.checkpoint.initial_load_path
    if path_of_base:
        config.checkpoint.initial_load_path = os.path.abspath(path_of_base)
    if left:
        told = ", ".join(f"{option} ({_GONE.get(option, 'no such option')})" for option in sorted(left))
        raise ValueError(f"{path}: torchtitan 0.3 has no counterpart of {told}.")
    if other := [name for name in converters if name != "lora"]:
        raise ValueError(
            f"{path}: model.converters = {converters}: {', '.join(other)} are converters of a model's config in "
            "torchtitan 0.3. In a config function, hand its config to lora_converter.titan03.lora."
        )
    return lora(config, **toml.get("lora", {})) if converters else config


class _Taker:
    def __init__(self, left: dict[str, Any]):
        self._left = left

    def __call__(self, option: str, *default: Any) -> Any:
        return self._left.pop(option, *default)


def _optimizer(take: Callable[..., Any]) -> Any:
    implementation, name = take("optimizer.implementation", "fused"), take("optimizer.name", "AdamW")
    betas = (take("optimizer.beta1", 0.9), take("optimizer.beta2", 0.95))
    own = {o: take(f"optimizer.{o}", d) for o, d in (("lr", 8e-4), ("eps", 1e-8), ("weight_decay", 0.1))}
    config = default_adamw(betas=betas, **own)
    config.implementation = implementation
    config.param_groups[0].optimizer_name = name
    return config


def _activation_checkpointing(take: Callable[..., Any]) -> Any:
    mode = take("activation_checkpoint.mode", "selective")
    if mode == "selective" and take("activation_checkpoint.selective_ac_option", "op") == "op":
        return SelectiveAC.Config()
    return {"none": None, "full": FullAC.Config()}[mode]


def _set(config: Any, option: str, value: Any) -> None:
    *parts, name = option.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)
