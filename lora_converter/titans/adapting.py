"""A model of torchtitan's gets its adapters: what both hosts do, in this order, on the meta device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn as nn

from lora_converter.adapted import AdaptedModule
from lora_converter.adapters import apply_lora
from lora_converter.experts import ExpertClasses
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.own_names import in_own_names
from lora_converter.run.job import Job
from lora_converter.titans.packed_base import pack_base
from lora_converter.titans.peft import as_it_starts


def settle(
    job: Job,
    model: nn.Module,
    naming: StateDictAdapter | None,
    expert_classes: ExpertClasses,
    canonical_name: Callable[[str], str] = str,
) -> Job:
    """The job, with settings that are said of the model's names, and those of a PEFT directory that it starts from.

    Raises:
        ValueError: See `in_own_names` and `as_it_starts`.
    """
    own = in_own_names(job.config, model, canonical_name, expert_classes)
    return as_it_starts(replace(job, config=own), model, naming, expert_classes)


def put_adapters(
    model: nn.Module, job: Job, naming: StateDictAdapter | None, expert_classes: ExpertClasses, **names: Any
) -> list[AdaptedModule]:
    """Packs what is to be packed, and puts adapters on, in place.

    Args:
        names: Further arguments of `apply_lora`.

    Raises:
        ValueError: See `pack_base` and `apply_lora`.
    """
    if job.config.base_format:
        pack_base(model, job, naming, expert_classes)
    tokens, rows = list(job.tokens.values()), job.base_rows
    own: Any = dict(tokens=tokens, base_rows=rows, expert_classes=expert_classes, **names)
    return apply_lora(model, job.config, seed=job.seed, **own)
