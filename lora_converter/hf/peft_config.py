"""`adapter_config.json`: what an adapter's settings may say, as one table. PEFT's words stay here.

Some fields change what the factors mean, and PEFT adds fields with every release. So each field that PEFT has is a row
of `FIELDS`: read, ignored because it is harmless, or refused unless it is off. A field that is not in the table is
refused by name unless it is off: null, false or empty. Format: PEFT 0.21.2, whose own `LoraConfig` a test compares with
the table.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_converter.files import REPLACED, read_json
from lora_converter.hf.trained_tokens import is_setting

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

PEFT_VERSION = "0.21.2"
"""Of the format that is written."""

DEFAULT_RANK, DEFAULT_ALPHA = 8, 8
"""PEFT's, of a file that leaves them out."""

_OFF: tuple = (None, False, {}, [], "")


@dataclass(frozen=True)
class Field:
    """What is made of one field.

    Attributes:
        does: "read", "ignored" or "refused" unless it is off.
        why: What it means, and of an ignored one why that is harmless.
        allowed: What a value that is read or accepted must be, for messages.
        accepts: Tells such values.
        nullable: null is accepted too, as leaving the field out is.
    """

    does: str
    why: str
    allowed: str = "null, false or empty"
    accepts: Callable[[Any], bool] = lambda value: value in _OFF
    nullable: bool = True


def _is_name_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= sys.float_info.max


def _is_table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa")
_A_NAME_LIST = "a string or a list of strings"


def _read(why: str, allowed: str, accepts: Callable[[Any], bool], *, nullable: bool = True) -> Field:
    return Field("read", why, allowed, accepts, nullable)


def _ignored(why: str) -> Field:
    return Field("ignored", why, "anything", lambda value: True)


def _refused(why: str) -> Field:
    return Field("refused", why)


FIELDS: dict[str, Field] = {
    "peft_type": _read("the method", "'LORA'", lambda value: value == "LORA"),
    "r": _read("the rank; 8 if left out", "an integer of at least 1", _is_rank, nullable=False),
    "lora_alpha": _read("the scaling's numerator; 8 if left out", "a finite number above 0", _is_alpha, nullable=False),
    "lora_dropout": _read(
        "dropout of its training",
        "a number of at least 0 and below 1",
        lambda value: _is_number(value) and 0 <= value < 1,
    ),
    "use_rslora": _read("scaling by √r", "true or false", _is_bool),
    "use_dora": _read("each module has a magnitude per row beside its factors (DoRA)", "true or false", _is_bool),
    "rank_pattern": _read(
        "ranks of single modules, by regular expressions of which the first that matches counts",
        "a table from expressions to integers of at least 1",
        _is_table(_is_rank),
    ),
    "alpha_pattern": _read(
        "alphas of single modules, in the same way", "a table from expressions to numbers above 0", _is_table(_is_alpha)
    ),
    "fan_in_fan_out": _read(
        "base weights are (in, out); the module or the model type decides where either is known, as in PEFT",
        "true or false",
        _is_bool,
    ),
    "target_modules": _read(
        "shown by inspect; the factors' own names say what is adapted", _A_NAME_LIST, _is_name_list
    ),
    "target_parameters": _read(
        "stacked experts, of which it says which parameters are adapted, and linears named by their weights",
        "a list of strings",
        lambda value: isinstance(value, list) and _is_name_list(value),
    ),
    "base_model_name_or_path": _read("where its base was", "a string", lambda value: isinstance(value, str)),
    "init_lora_weights": Field(
        "refused",
        "how the factors began. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base too: unless PEFT converted the "
        "adapter when it was saved (path_initial_model_for_weight_conversion), the factors belong to that changed "
        "base. PiSSA's and OLoRA's is computed again; that of a randomised SVD without a seed (pissa_niter_N), or of "
        "data, cannot be",
        "true, false, 'gaussian', 'eva', 'orthogonal', 'mica', 'pissa' or 'olora'",
        lambda value: isinstance(value, str | bool) and (value in _INITS or str(value).lower() == "olora"),
    ),
    "bias": Field("refused", "biases were trained and are stored beside", "'none'", lambda value: value == "none"),
    "lora_bias": _refused("B has a bias"),
    "modules_to_save": _read(
        "modules trained in full, by the ends of their names; their weights are stored beside",
        _A_NAME_LIST,
        _is_name_list,
    ),
    "trainable_token_indices": _read(
        "tokens whose rows were trained, of the embedding or of each of some modules; the rows are stored beside",
        "a list of ids, or a table from modules to such",
        lambda value: value in _OFF or is_setting(value),
    ),
    "use_qalora": _refused("A sees pooled inputs (QA-LoRA)"),
    "use_bdlora": _refused("factors are block-diagonal"),
    "alora_invocation_tokens": _refused("the adapter acts from these tokens on alone (aLoRA)"),
    "layer_replication": _refused("the base has layers that stand several times"),
    "arrow_config": _refused("several adapters are routed between"),
    "kasa_config": _refused("a diagonal stands between the factors, and the base was truncated (KaSA)"),
    "monteclora_config": _refused("the factors are sampled in training and stored with their variances"),
    "velora_config": _refused("buffers of the training are stored beside"),
    "megatron_config": _refused("the base's linears are Megatron's"),
    "task_type": _ignored("which head transformers puts on"),
    "auto_mapping": _ignored("which class PEFT loads the base with"),
    "peft_version": _read(
        "which way round factors of stacked experts are where shapes do not tell: otherwise before 0.19",
        "a string",
        lambda value: isinstance(value, str),
    ),
    "revision": _ignored("of the base on a hub"),
    "inference_mode": _ignored("whether PEFT freezes what it loads"),
    "exclude_modules": _ignored("chose what was adapted; the factors' names say what was"),
    "layers_to_transform": _ignored("the same"),
    "layers_pattern": _ignored("the same"),
    "megatron_core": _ignored("a module's name, without effect where megatron_config is off"),
    "loftq_config": _ignored("without effect where init_lora_weights is not 'loftq'"),
    "eva_config": _ignored("chose A's first values; ranks that it moved are in rank_pattern"),
    "corda_config": _ignored("without effect where init_lora_weights is not 'corda'"),
    "lora_ga_config": _ignored("without effect where init_lora_weights is not 'lora_ga'"),
    "qalora_group_size": _ignored("without effect where use_qalora is off"),
    "runtime_config": _ignored("where PEFT computes; not stored"),
    "ensure_weight_tying": _refused("what is stored beside was tied to the output head, and trained there too"),
}
"""Every field of PEFT's `LoraConfig`, and what is made of it. docs/peft.md shows it."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a PEFT directory, every one of a kind and value that is understood.

    Raises:
        ValueError: There is no such file, or a field has a value that is not supported, with both.
    """
    if not folder.is_dir():
        killed = folder.with_name(folder.name + REPLACED)
        hint = f" {killed} is what a writer that was killed left of the last one: rename it back." * killed.is_dir()
        raise ValueError(
            f"{folder} is not a folder. Name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.{hint}"
        )
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_FILE}, so it is no PEFT directory.") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type = {config.get('peft_type')!r}; only 'LORA' is supported.")
    for name, value in config.items():
        problem = _problem(name, value)
        if problem:
            raise ValueError(f"{path}: {problem}")
    return config


def _problem(name: str, value: Any) -> str:
    """What is wrong with a field; nothing if it is understood."""
    field = FIELDS.get(name)
    if field is None:
        if value in _OFF:
            return ""
        return (
            f"{name} = {value!r} is not supported: the field is newer than PEFT {PEFT_VERSION}, or of another program, "
            f"and may change what the factors mean. If it does not, take it out of {CONFIG_FILE}."
        )
    if (value is None and field.nullable) or field.accepts(value):
        return ""
    if field.does == "read":
        return f"{name} = {value!r}; it must be {field.allowed}."
    return f"{name} = {value!r} is not supported; it must be {field.allowed} ({field.why})."


def as_list(target_modules: Any) -> list[str]:
    """`target_modules`, which may be one string or left out."""
    return [target_modules] if isinstance(target_modules, str) else list(target_modules or [])
