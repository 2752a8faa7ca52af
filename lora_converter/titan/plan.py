"""`lora-converter plan my.toml`: what a step of a job takes on a rank, from its TOML file alone.

No weights, no data, no GPU: `plan_trainer.py` runs a step of torchtitan's trainer on fake tensors. This file
reads the job, takes out what needs files, and asks for the same of what the job could be instead.
"""

import copy
import importlib
import math
import os
from collections.abc import Iterator
from typing import Any

from lora_converter.plan import Estimate, Plan
from lora_converter.titan.installed import install
from lora_converter.titans import cpu

_LAYOUT = {
    "data_parallel_replicate_degree": "dp_replicate",
    "data_parallel_shard_degree": "dp_shard",
    "context_parallel_degree": "cp",
    "tensor_parallel_degree": "tp",
    "pipeline_parallel_degree": "pp",
}


def plan_job(path: str, options: list[str], *, gpus: int | None = None, memory: float = 80.0) -> Plan:
    """The plan of the job that a TOML file and torchtitan's options describe.

    Args:
        path: The TOML file.
        options: torchtitan's, which win over the file.
        gpus: All of the job; those that its layout asks for, if None.
        memory: Of one, GiB.

    Raises:
        ValueError: The job cannot be run, or not on fake tensors.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file. Name the TOML file of a job.")
    if not memory > 0:
        raise ValueError(f"--memory {memory:g}: must be above 0, the GiB of one GPU.")
    job_config = job_without_files(path, options)
    gpus = _check_gpus(job_config.parallelism, gpus)
    found = _largest(job_config, gpus)
    modes = {name: _largest(changed, gpus) for name, changed in _checkpointing(job_config)}
    own = _mode(job_config)
    variations = {} if found.fits(memory) else {name: _tried(*job) for name, *job in _variations(job_config, gpus)}
    return Plan(
        _describe(path, job_config, gpus),
        found,
        memory,
        {f"{own} (as set)": found, **modes},
        variations,
        _notes(job_config),
    )


def job_without_files(path: str, options: list[str]) -> Any:
    """The job config of a TOML file and torchtitan's options, without what needs files."""
    cpu.prepare(anyway=True)
    install()
    from torchtitan.config import ConfigManager

    from lora_converter.titan.checks import require_config_module

    arguments = ["--job.config_file", path, *options]
    try:
        require_config_module(arguments)
    except ValueError as e:
        if type(e) is ValueError:
            raise
        raise ValueError(f"{path} is no TOML file: {e}.") from None
    job_config = ConfigManager().parse_args(arguments)
    _check_model(job_config)
    if job_config.training.enable_cpu_offload:
        raise ValueError("training.enable_cpu_offload = true: a plan counts everything on the GPU. Set it to false.")
    checkpoint, metrics = job_config.checkpoint, job_config.metrics
    checkpoint.enable = checkpoint.initial_load_in_hf = checkpoint.last_save_in_hf = False
    checkpoint.initial_load_path = ""
    metrics.enable_tensorboard = metrics.enable_wandb = job_config.validation.enable = False
    metrics.log_freq, job_config.training.dataset, job_config.debug.seed = 10**9, "c4", 0
    if hasattr(job_config, "lora"):
        job_config.lora.initial_adapter_path, job_config.lora.save_merged = "", False
        job_config.lora.full_phase.steps = 0
    return job_config


def _check_model(job_config: Any) -> None:
    """That there is such a model.

    Raises:
        ValueError: It or its flavor is unknown.
    """
    from torchtitan.protocols.train_spec import get_train_spec

    model = job_config.model
    if job_config.experimental.custom_import:
        importlib.import_module(job_config.experimental.custom_import)
    flavors = get_train_spec(model.name).model_args
    if model.flavor not in flavors:
        raise ValueError(f"model.flavor = {model.flavor!r}: {model.name} has {', '.join(flavors)}. Name one of them.")


def _check_gpus(parallelism: Any, gpus: int | None) -> int:
    """How many the job has.

    Raises:
        ValueError: The layout is not one of so many.
    """
    degrees = {name: getattr(parallelism, option) for option, name in _LAYOUT.items()}
    for option, name in _LAYOUT.items():
        if degrees[name] < 1 and (name, degrees[name]) != ("dp_shard", -1):
            raise ValueError(f"parallelism.{option} = {degrees[name]}: must be at least 1.")
    fixed = math.prod(degree for degree in degrees.values() if degree > 0)
    experts = parallelism.expert_parallel_degree * parallelism.expert_tensor_parallel_degree
    ranks = max(degrees["dp_shard"], 1) * degrees["cp"] * degrees["tp"]  # those of experts
    if -1 in degrees.values():
        fixed *= math.lcm(experts, ranks) // ranks
    elif parallelism.expert_parallel_degree > 1 and ranks % experts:
        raise ValueError(
            f"parallelism.expert_parallel_degree = {parallelism.expert_parallel_degree}: the {ranks} ranks of dp_shard "
            f"x cp x tp must be a multiple of it, times expert_tensor_parallel_degree: {experts}."
        )
    degrees["ep"] = parallelism.expert_parallel_degree
    if gpus is None:
        return fixed
    shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "1"
    if -1 in degrees.values():
        if gpus < 1 or gpus % fixed:
            raise ValueError(
                f"--gpus {gpus}: the layout ({shown}) takes a multiple of {fixed}. Give one, or change [parallelism]."
            )
    elif gpus != fixed:
        raise ValueError(
            f"--gpus {gpus}: the layout ({shown}) takes {fixed}. Give that, or set "
            "parallelism.data_parallel_shard_degree = -1, which takes the GPUs that are left."
        )
    return gpus


def _largest(job_config: Any, gpus: int) -> Estimate:
    """The estimate of the rank that takes most: pipeline stages differ, other ranks do not."""
    from lora_converter.titan.plan_trainer import estimate

    stages = job_config.parallelism.pipeline_parallel_degree
    found = []
    for stage in range(stages):
        try:
            found.append(estimate(copy.deepcopy(job_config), gpus=gpus, rank=stage * gpus // stages))
        except ValueError:
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            raise ValueError(
                f"This job cannot be run on fake tensors ({reason}). If it runs on GPUs, look at the memory of its "
                "first steps there."
            ) from e
    return max(found, key=lambda estimate: estimate.peak)


def _tried(job_config: Any, gpus: int) -> Estimate | str:
    try:
        return _largest(job_config, gpus)
    except ValueError as e:
        return str(e)


def _changed(job_config: Any, **values: Any) -> Any:
    """A copy with other values, `section__option=value`."""
    changed = copy.deepcopy(job_config)
    for name, value in values.items():
        section, option = name.split("__")
        setattr(getattr(changed, section), option, value)
    return changed


def _mode(job_config: Any) -> str:
    ac = job_config.activation_checkpoint
    return f"{ac.mode} {ac.selective_ac_option}" if ac.mode == "selective" else str(ac.mode)


def _checkpointing(job_config: Any) -> Iterator[tuple[str, Any]]:
    """The other modes."""
    for mode in ("none", "selective", "full"):
        changed = _changed(job_config, activation_checkpoint__mode=mode)
        if mode != job_config.activation_checkpoint.mode:
            yield _mode(changed), changed


def _variations(job_config: Any, gpus: int) -> Iterator[tuple[str, Any, int]]:
    """Name, job and GPUs of what a job that does not fit could be instead."""
    lora = getattr(job_config, "lora", None)
    if lora and not (lora.base_format or lora.use_dora or lora.init):  # of dense weights
        yield "packed base (nf4)", _changed(job_config, lora__base_format="nf4"), gpus
    shards, tp = _shards(job_config.parallelism, gpus), job_config.parallelism.tensor_parallel_degree
    layout = dict(parallelism__data_parallel_shard_degree=2 * shards)
    yield f"FSDP {2 * shards}, {2 * gpus} GPUs", _changed(job_config, **layout), 2 * gpus
    left, more = (shards // 2, gpus) if shards % 2 == 0 else (shards, 2 * gpus)
    layout = dict(parallelism__data_parallel_shard_degree=left, parallelism__tensor_parallel_degree=2 * tp)
    yield f"TP {2 * tp}, {more} GPUs", _changed(job_config, **layout), more
    if job_config.activation_checkpoint.mode != "full":
        yield "full AC", _changed(job_config, activation_checkpoint__mode="full"), gpus
    half = job_config.training.seq_len // 2
    yield f"sequence {half}", _changed(job_config, training__seq_len=half), gpus


def _shards(parallelism: Any, gpus: int) -> int:
    """FSDP's degree, or what is left for it."""
    return gpus // math.prod(getattr(parallelism, option) for option, name in _LAYOUT.items() if name != "dp_shard")


def _describe(path: str, job_config: Any, gpus: int) -> str:
    model, training = job_config.model, job_config.training
    degrees = {name: getattr(job_config.parallelism, option) for option, name in _LAYOUT.items()}
    degrees["dp_shard"] = _shards(job_config.parallelism, gpus)
    degrees["ep"] = job_config.parallelism.expert_parallel_degree
    layout = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"
    return (
        f"{path}: {model.name} {model.flavor}, {gpus} GPU{'s' * (gpus > 1)} ({layout}), {training.local_batch_size} x "
        f"{training.seq_len} tokens a rank and step, {_mode(job_config)} activation checkpointing"
        f"{', compiled' * job_config.compile.enable}"
    )


def _notes(job_config: Any) -> list[str]:
    """What was not run as it will be, by what the job has."""
    parallelism, compiles = job_config.parallelism, job_config.compile
    ddp = parallelism.data_parallel_replicate_degree > 1 and parallelism.data_parallel_shard_degree == 1
    pipeline = parallelism.pipeline_parallel_degree > 1
    compiled = compiles.components if compiles.enable else []
    notes = {
        "Run: the model, its layout and torchtitan's own step, on fake CPU tensors. By the shapes of CUDA's kernels "
        "instead: attention and RMS norm. Every token has a label.": True,
        "Compiled layers are counted as they run eagerly; compiled they keep as much or less.": "model" in compiled,
        "A compiled loss is counted by formula: logits, one gradient of them, a number per token.": "loss" in compiled,
        "DDP's buckets are counted by formula: as large as the gradients.": ddp,
        "A stage's inputs are counted by formula: hidden states of a micro-batch.": pipeline,
        "Routed experts are sent the same number of tokens each.": _has_experts(job_config.model),
        "Not counted: the CUDA context, collectives' own buffers, what the allocator cannot use; that is what the 10 % "
        "are for.": True,
    }
    return [note for note, holds in notes.items() if holds]


def _has_experts(model: Any) -> bool:
    from torchtitan.protocols.train_spec import get_train_spec

    args = get_train_spec(model.name).model_args[model.flavor]
    return bool(getattr(args, "moe_enabled", hasattr(args, "moe_args")))
