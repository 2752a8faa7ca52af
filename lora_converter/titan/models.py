"""torchtitan's models and their StateDictAdapters, without a job: for tools that read step folders."""

from typing import Any

import torch
import torch.nn as nn
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter.hf.naming import StateDictAdapter


def model_on_meta(model: str, flavor: str) -> tuple[nn.Module, StateDictAdapter]:
    """A model without weights, and its StateDictAdapter.

    Raises:
        ValueError: torchtitan has no such model, or cannot express it in Hugging Face's terms.
    """
    try:
        spec = get_train_spec(model)
        args = spec.model_args[flavor]
    except (KeyError, ValueError):
        raise ValueError(f"torchtitan has no model {model!r} {flavor!r}.") from None
    if spec.state_dict_adapter is None:
        raise ValueError(f"{model} has no StateDictAdapter to name Hugging Face's modules by.")
    return built_on_meta(spec, args, JobConfig()), spec.state_dict_adapter(args, None)


def built_on_meta(spec: Any, args: Any, job_config: Any) -> nn.Module:
    """The model of a TrainSpec as a job config makes it, on the meta device."""
    args.update_from_config(job_config)
    with torch.device("meta"):
        return spec.model_cls(args)
