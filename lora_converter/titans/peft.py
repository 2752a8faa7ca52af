"""PEFT's directories around a job: the settings of the one it starts from, and whether it can write its own."""

from dataclasses import replace

import torch.nn as nn

from lora_converter.adapted import AdaptedModule, check_peft_forms, has_stacked_experts
from lora_converter.experts import ExpertClasses, expert_shapes
from lora_converter.hf.bridge import names_of_linears
from lora_converter.hf.expert_bridge import host_experts
from lora_converter.hf.expert_patterns import linears_like_experts
from lora_converter.hf.export_checks import check_exportable, check_mergeable
from lora_converter.hf.magnitudes import check_no_magnitudes_of_parameters
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.peft_directory import is_peft_directory
from lora_converter.linear import linear_shapes
from lora_converter.new_tokens import token_rows
from lora_converter.ranks import agreed, together
from lora_converter.run.job import Job
from lora_converter.run.peft_io import config_of_peft, load_peft_everywhere
from lora_converter.trained import trained_parameters


def as_it_starts(job: Job, model: nn.Module, naming: StateDictAdapter | None, expert_classes: ExpertClasses) -> Job:
    """The job, with the settings of the PEFT directory that it starts from, if it does. A collective then.

    Args:
        model: Without adapters.

    Raises:
        ValueError: A setting differs from the directory's, or the model has no names for PEFT's modules.
    """
    path = job.config.initial_adapter_path
    if not (path and agreed(is_peft_directory(path), f"Whether {path} is a PEFT directory")):
        return job
    if naming is None:
        raise ValueError("lora.initial_adapter_path: the model has no StateDictAdapter to name PEFT's modules by.")
    linears, experts = linear_shapes(model), host_experts(naming, expert_shapes(model, expert_classes))
    peft = load_peft_everywhere(path, naming, linears, experts)
    return replace(job, config=config_of_peft(job.config, peft, naming, linears, experts))


def check_results(job: Job, model: nn.Module, naming: StateDictAdapter | None, adapted: list[AdaptedModule]) -> None:
    """That what is to be written at the end can be, before the training.

    Args:
        adapted: The model's adapted modules.

    Raises:
        ValueError: It cannot.
    """
    if not job.exports_peft:
        return
    check_peft_forms(adapted)
    names = [module.lora_fqn for module in adapted if module.peft_factors]
    linears, experts = linear_shapes(model), expert_shapes(model)
    trained = {name: tuple(param.shape) for name, param in trained_parameters(model).items()}
    trained |= {f"{m.lora_fqn}.weight": tuple(m.weight.shape) for m in token_rows(model).values()}
    check_exportable(naming, linears, names, experts, trained)
    if job.config.use_dora and naming is not None and has_stacked_experts(model):
        own = {fqn: linears[fqn] for fqn in names if fqn in linears}
        check_no_magnitudes_of_parameters(True, linears_like_experts(names_of_linears(naming, own)))
    if job.config.save_merged and naming is not None and job.base is not None:
        base = job.base.path
        together(lambda: check_mergeable(naming, linears, names, base, experts))
