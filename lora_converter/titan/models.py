"""torchtitan's models and their StateDictAdapters, without a job: for tools that read step folders."""

import copy
import dataclasses
import importlib
import logging
from typing import Any

import torch
import torch.nn as nn
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter.run.host import HostModel
from lora_converter.titan.experts import EXPERT_CLASSES

logger = logging.getLogger(__name__)


def model_on_meta(model: str, flavor: str, custom_import: str = "") -> HostModel:
    """A model without weights, its StateDictAdapter, and the classes of its routed experts.

    Args:
        custom_import: Module to import first, which registers the model, as `experimental.custom_import` does.

    Raises:
        ValueError: torchtitan has no such model, or cannot express it in Hugging Face's terms.
    """
    if custom_import:
        logger.info("Importing %s, which registers %s %s.", custom_import, model, flavor)
        try:
            importlib.import_module(custom_import)
        except ImportError as e:
            raise ValueError(f"{custom_import} cannot be imported ({e}). Name a module with --import.") from None
    try:
        spec = get_train_spec(model)
        args = spec.model_args[flavor]
    except (KeyError, ValueError):
        raise ValueError(
            f"torchtitan has no model {model!r} {flavor!r}. If a module of yours registers it, name it with --import."
        ) from None
    if spec.state_dict_adapter is None:
        raise ValueError(f"{model} has no StateDictAdapter to name Hugging Face's modules by.")
    naming = for_names(spec.state_dict_adapter(args, None))
    return HostModel(built_on_meta(spec, args, JobConfig()), naming, EXPERT_CLASSES)


def for_names(adapter: Any) -> Any:
    """A model's StateDictAdapter for asking about single weights: a tied output head has a name of its own there.

    The host leaves a tied head out, since it is the embedding; its adapter is not.
    """
    args: Any = getattr(adapter, "model_args", None)
    if not getattr(args, "enable_weight_tying", False):
        return adapter
    untied = copy.copy(adapter)
    untied.model_args = dataclasses.replace(args, enable_weight_tying=False)
    return untied


def built_on_meta(spec: Any, args: Any, job_config: Any) -> nn.Module:
    """The model of a TrainSpec as a job config makes it, on the meta device."""
    args.update_from_config(job_config)
    with torch.device("meta"):
        return spec.model_cls(args)
