"""torchtitan 0.2.2's TOML files and command lines, read without it, for a host whose sections are made otherwise.

An option means what it means there: the defaults are 0.2.2's. The host's own options may be given, too. What the host
has not is refused by name, with what there is in its place, all such together.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, make_dataclass, replace
from typing import Any

import tyro
from torchtitan.config import ConfigManager
from torchtitan.config.manager import custom_registry

from lora_converter.chat.settings import ChatConfig
from lora_converter.run.job import RunConfig
from lora_converter.titans.chat_data import CHAT

MODES = ("none", "full", "selective", "memory_budget")
"""Of activation checkpointing."""


@dataclasses.dataclass
class _Workers:
    """`[training.dataloader]` and `[validation.dataloader]`."""

    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = False
    prefetch_factor: int | None = None


OWN: dict[str, dict[str, Any]] = {
    "job": dict(config_file="", dump_folder="./outputs", description="", custom_config_module="", print_config=False)
    | dict(save_config_file=None),
    "model": dict(name="llama3", flavor="debugmodel", hf_assets_path="./tests/assets/tokenizer", converters=[]),
    "optimizer": dict(name="AdamW", lr=8e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, implementation="fused"),
    "training": dict(dataset="c4_test", dataset_path=None, dataloader=_Workers(), disable_cuda_graphs=True),
    "parallelism": dict(enable_async_tensor_parallel=False),
    "activation_checkpoint": dict(mode="selective", selective_ac_option="2")
    | dict(per_op_sac_force_recompute_mm_shapes_by_fqns=["moe.router.gate"]),
    "profiling": dict(save_traces_folder="profile_traces", save_memory_snapshot_folder="memory_snapshot"),
    "validation": dict(dataset="c4_validation", dataset_path=None, local_batch_size=0, seq_len=0)
    | dict(dataloader=_Workers()),
    "experimental": dict(custom_import=""),
    "lora": {},
    "chat": {},
}
"""Section -> options that 0.3's class of it has not, or with another default. 0 stands for [training]'s."""

GONE: dict[str, tuple[Any, str]] = {
    "model.print_after_conversion": (False, "print the model from a config function"),
    "model.tokenizer_path": (None, "it is model.hf_assets_path"),
    "optimizer.early_step_in_backward": (False, "no optimizer steps in the backward"),
    "parallelism.disable_loss_parallel": (False, "the loss is always sharded under tensor parallelism"),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (True, "the schedule says it"),
    "parallelism.context_parallel_rotate_method": ("allgather", "keys and values are always gathered"),
    "parallelism.expert_tensor_parallel_degree": (1, "experts are sharded by parallelism.expert_parallel_degree alone"),
    "parallelism.expert_parallel_comm_backend": ("standard", "model_registry(..., moe_comm_backend=...) has it"),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, "torchft is no part of it"),
    "fault_tolerance": ({"enable": False}, "torchft is no part of it"),
    "memory_estimation": ({"enable": False}, "`lora-converter plan` estimates it, with torchtitan 0.2.2"),
    "activation_checkpoint.early_stop": (False, "blocks are always recomputed whole"),
    "experimental.custom_args_module": ("", "config functions take its place"),
    "quantize": (None, "a config function says model_registry(..., converters=[Float8LinearConverter.Config(...)])"),
    "lora.full_phase": ({"steps": 0}, "its first phase is not run yet: train it as a job of its own"),
}
"""What 0.3 has not -> the value that asks for nothing, and what there is instead."""


def read_job(arguments: list[str], sections: Mapping[str, type]) -> Any:
    """The job that a command line describes, whose options win over its TOML file: a dataclass of each section.

    Args:
        sections: The host's classes that have the options of a section, or more of them.

    Raises:
        ValueError: Options or values of which the host has no counterpart.
    """
    given = _given(arguments)
    path, toml = given.get("job", {}).get("config_file"), {}
    if path:
        try:
            with open(path, "rb") as opened:
                toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").load(opened)
        except (OSError, ValueError) as e:  # no such file, or no TOML
            raise ValueError(f"job.config_file = {path!r}: {e}.") from None
    elif "help" not in given:
        raise ValueError("No job is named: give --job.config_file my.toml, or --module and --config.")
    classes = {"lora": RunConfig, "chat": ChatConfig, **sections}
    made = {name: _options(classes.get(name, object), OWN.get(name, {})) for name in {**OWN, **classes}}
    whole = make_dataclass("Job", [(n, c, dataclasses.field(default_factory=c)) for n, c in made.items()])
    _refuse([*_unknown(whole(), toml), *_unknown(whole(), given)])
    ConfigManager()  # which registers how lists are written
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The field .* is annotated", category=UserWarning)
        try:
            own = dict(args=_without_gone(arguments), default=_filled(whole(), toml))
            file: Any = tyro.cli(whole, **own, registry=custom_registry)
        except UserWarning as e:
            raise ValueError(f"{path or 'the command line'}: {str(e).partition('. We')[0]}.") from None
    _refuse(list(_wrong_values(file)))
    return file


def _refuse(problems: list[str]) -> None:
    """Raises a ValueError that names all `problems`, if there are any."""
    if problems:
        raise ValueError(f"torchtitan 0.3 has no counterpart of {'; '.join(dict.fromkeys(problems))}.")


def _options(base: type, own: dict[str, Any]) -> Any:
    """A class of options: those of another, and more, or other defaults. Values are checked when they are used."""
    types = {n: list[str] if isinstance(v, list) else str | None if v is None else type(v) for n, v in own.items()}
    made = [
        (name, types[name], dataclasses.field(default_factory=functools.partial(copy.copy, v)))
        for name, v in own.items()
    ]
    unchecked = {"__post_init__": lambda self: None}
    return make_dataclass("Options", made, bases=(base,), kw_only=True, namespace=unchecked)


def _given(arguments: list[str]) -> dict[str, Any]:
    """Options of a command line as a TOML file has them."""
    given: dict[str, Any] = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            *sections, option = name.replace("-", "_").split(".")
            table = given
            for section in sections:
                table = table.setdefault(section, {})
            given_to, plain = value or following * (not following.startswith("--")), option.removeprefix("no_")
            table[plain] = _typed(given_to) if given_to else plain == option
    return given


def _without_gone(arguments: list[str]) -> list[str]:
    """A command line without the options of `GONE`, which ask for nothing by then."""
    kept, goes = list[str](), False
    for argument in arguments:
        if argument.startswith("--"):
            sections, _, option = argument[2:].partition("=")[0].replace("-", "_").rpartition(".")
            name = f"{sections}.{option.removeprefix('no_')}."
            goes = any(name.startswith(f"{gone}.") for gone in GONE)
        kept += [] if goes else [argument]
    return kept


def _typed(text: str) -> Any:
    """A value of a command line, as a file would have it."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _unknown(known: Any, given: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Options that are not among the `known`, with what there is instead."""
    names = [f.name for f in fields(known)]
    for name, value in given.items():
        option, of = f"{within}{name}", getattr(known, name, None)
        if is_dataclass(of) and isinstance(value, Mapping):
            yield from _unknown(of, value, f"{option}.")
        elif name not in names and option in GONE:
            nothing, instead = GONE[option]
            tables = isinstance(value, Mapping) and isinstance(nothing, Mapping)
            if not (nothing.items() <= value.items() if tables else value == nothing):
                yield f"{option} ({instead})"
        elif name not in names and option != "help":
            near = difflib.get_close_matches(name, names, 1)
            yield f"{option} (no such option{f'; {within}{near[0]} is one' if near else ''})"


def _wrong_values(file: Any) -> Iterator[str]:
    """Values that the host cannot be given, with what there is instead."""
    training, validation, ac = file.training, file.validation, file.activation_checkpoint
    if validation.enable and validation.dataset.lower() == CHAT != training.dataset.lower():
        yield f'validation.dataset = "{CHAT}" (it is for jobs with training.dataset = "{CHAT}")'
    if other := [name for name in file.model.converters if name != "lora"]:
        yield f"model.converters: {', '.join(other)} ({GONE['quantize'][1]}, then lora_converter.titan03.lora(config))"
    for option in ("local_batch_size", "seq_len") if validation.enable else ():
        if getattr(validation, option) not in (0, getattr(training, option)):
            yield f"validation.{option} = {getattr(validation, option)} (it is that of training)"
    if (module := file.job.custom_config_module) not in ("", "lora_converter.titan"):
        yield f"job.custom_config_module = {module!r} (a config function has what it adds)"
    if ac.mode not in MODES:
        yield f"activation_checkpoint.mode = {ac.mode!r} (it is one of {', '.join(MODES)})"
    if ac.selective_ac_option != "op" and not ac.selective_ac_option.isdigit():
        yield f"activation_checkpoint.selective_ac_option = {ac.selective_ac_option!r} (it is 'op')"


def _filled(default: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass with the values of a TOML table, those inside it too."""
    own = {f.name: getattr(default, f.name) for f in fields(default)}
    new = {n: _filled(own[n], v) if is_dataclass(own[n]) else v for n, v in values.items() if n in own}
    return replace(default, **new)
