"""torchtitan 0.2.2's TOML files and command lines as configs of 0.3: see `reading.py` for how they are read."""

import os
from dataclasses import fields, replace
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from lora_converter.run.job import RunConfig
from lora_converter.titan03.conversations import ChatLoader, chat
from lora_converter.titan03.model import made_of
from lora_converter.titan03.models import spec_of
from lora_converter.titan03.trainer import lora
from lora_converter.titans.chat_data import CHAT
from lora_converter.toml03.reading import read_job

_MODES = {"none": None, "full": FullAC.Config, "selective": SelectiveAC.Config, "memory_budget": MemoryBudgetAC.Config}
_OTHER_NAMES = {"profiler": "profiling", "validator": "validation"}
_SAME = ("training", "parallelism", "checkpoint", "compile", "comm", "debug", "lr_scheduler", "metrics", "profiler")
"""Fields of a trainer's config that are sections of the file."""

_CLASSES: dict[str, Any] = {f.name: f.default_factory for f in fields(Trainer.Config)}
_SECTIONS: dict[str, Any] = {_OTHER_NAMES.get(name, name): _CLASSES[name] for name in (*_SAME, "validator")}

arguments: list[str] = []
"""The command line of `job`, a config function, which is called without any."""


def job() -> Any:
    """The config of the job that `arguments` describe.

    Raises:
        ValueError: 0.3 has no counterpart of options or values.
    """
    file = read_job(arguments, _SECTIONS | {"activation_checkpoint": MemoryBudgetAC.Config})
    model, ac, adam, validation = file.model, file.activation_checkpoint, file.optimizer, file.validation
    spec = spec_of(model.name, model.flavor, file.experimental.custom_import)
    if ac.mode == "selective" and ac.selective_ac_option != "op":
        logger.warning("activation_checkpoint.selective_ac_option: torchtitan 0.3 selects by operator, not by layer.")
    ac.force_recompute_mm_shapes_by_fqns = ac.per_op_sac_force_recompute_mm_shapes_by_fqns
    optimizer = default_adamw(adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
    optimizer.implementation, optimizer.param_groups[0].optimizer_name = adam.implementation, adam.name
    if path := file.checkpoint.initial_load_path:
        file.checkpoint.initial_load_path = os.path.abspath(path)
    same: dict[str, Any] = {n: made_of(_CLASSES[n], getattr(file, _OTHER_NAMES.get(n, n))) for n in _SAME}
    if file.parallelism.enable_async_tensor_parallel:
        same["compile"] = replace(same["compile"], enable_async_tensor_parallel=True)
    same["debug"].print_config, same["debug"].save_config_file = file.job.print_config, file.job.save_config_file
    config = Trainer.Config(
        model_spec=spec,
        dump_folder=file.job.dump_folder,
        hf_assets_path=model.hf_assets_path,
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))),
        optimizer=optimizer,
        dataloader=_loader(file.training),
        validator=made_of(Validator.Config, validation, dataloader=_loader(validation)),
        activation_checkpoint=(ac_class := _MODES[ac.mode]) and made_of(ac_class, ac),
        **same,
    )
    if file.training.dataset.lower() == CHAT:
        config = chat(config, file.training.dataset_path or "", **vars(file.chat))
    if "lora" in model.converters:
        return lora(config, **vars(file.lora))
    if vars(file.lora) != vars(RunConfig()):
        logger.warning('[lora] is set, but model.converters has no "lora": every weight trains.')
    return config


def _loader(section: Any) -> Any:
    """Where [training] or [validation] reads its data."""
    if section.dataset.lower() == CHAT:
        return ChatLoader.Config(dataset_path=section.dataset_path)
    names = {"dataset": section.dataset, "dataset_path": section.dataset_path}
    return HuggingFaceTextDataLoader.Config(**names, **vars(section.dataloader))
