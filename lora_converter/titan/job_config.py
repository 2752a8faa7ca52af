"""torchtitan's JobConfig with a `[lora]` section.

torchtitan merges this class into its own when `job.custom_config_module` names `lora_converter.titan`. A project
with a config module of its own derives from this one. No postponed annotations here: the merge reads types.
"""

import functools
import os
from dataclasses import dataclass, field
from typing import Any

from torchtitan.components.checkpoint import DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER, TRAIN_STATE
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as TorchtitanJobConfig

from lora_converter.config import LoRAConfig
from lora_converter.titan.ranks import agreed_options

MISSING_CONFIG_MODULE = (
    "LoRA is used, but job.custom_config_module is not set, so there is no [lora] section: "
    'add custom_config_module = "lora_converter.titan" under [job].'
)

FULL_PHASE_FOLDER = "_full_phase"
"""Added to the names of the folders of phase 1."""

PARTS = (MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE)
"""What a checkpoint is made of, in torchtitan's names."""


@dataclass
class FullPhase:
    """`[lora.full_phase]`: every weight is trained first, and the adapters then on the result (see `phases.py`)."""

    steps: int = 0
    """Steps that train every weight before the adapters; 0 for none. Needs lora_converter.train."""

    dataset: str = ""
    """Dataset of these steps; that of [training] if empty."""

    dataset_path: str = ""
    """Its path; that of [training] if empty."""

    lr: float = 0.0
    """Learning rate of these steps; that of [optimizer] if 0."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"lora.full_phase.steps = {self.steps}: must be at least 0.")
        if self.lr < 0:
            raise ValueError(f"lora.full_phase.lr = {self.lr}: must be at least 0.")


@dataclass
class LoRA(LoRAConfig):
    """`[lora]`: the adapter's settings, and where it starts from."""

    initial_adapter_path: str = ""
    """
    Adapters that this run starts from: a step folder of an earlier LoRA run (DCP), or a PEFT directory, whose rank,
    alpha, rsLoRA and targets hold where [lora] leaves them at their defaults. Only adapters are read: the base comes
    from checkpoint.initial_load_path, and optimizer and step are fresh. Not loaded when the run resumes from its own
    checkpoint folder.
    """

    accept_other_base: bool = False
    """
    Resume, or start from initial_adapter_path, although the base's fingerprint is not the one that the adapters were
    trained on. Without it that is an error.
    """

    save_merged: bool = False
    """
    At the end also write base + adapter as a Hugging Face directory, checkpoint/merged-N beside the PEFT directory
    step-N. Needs checkpoint.last_save_in_hf and a base in Hugging Face's format.
    """

    full_phase: FullPhase = field(default_factory=FullPhase)
    """A phase before, in which every weight is trained."""

    def __post_init__(self) -> None:
        if self.exclude_modules == [""]:  # what `--lora.exclude_modules ""` gives: torchtitan splits at commas
            self.exclude_modules = []
        super().__post_init__()


@dataclass
class JobConfig:
    """What this package adds to torchtitan's JobConfig."""

    lora: LoRA = field(default_factory=LoRA)
    """Low-rank adapters; used when model.converters has "lora"."""


_OF_THE_MACHINE = ("comm.", "fault_tolerance.", "job.config_file", "metrics.", "profiling.")
"""What may differ between ranks of the job config, but for how often metrics are reduced over them."""


@functools.cache
def compare_jobs_over_ranks() -> None:
    """Makes ranks with different settings fail together, before they wait for each other in vain.

    `maybe_log` is what the trainer calls first when the process group is there: before the seed is shared, before any
    mesh. Remove when torchtitan compares job configs itself.
    """
    log = TorchtitanJobConfig.maybe_log

    @functools.wraps(log)
    def compare_and_log(self: Any) -> None:
        if hasattr(self, "lora"):
            agreed_options(_options(self))
        log(self)

    TorchtitanJobConfig.maybe_log = compare_and_log  # type: ignore[method-assign]


def _options(job_config: Any) -> dict[str, Any]:
    """The options that must be the same on all ranks, as they are written on the command line."""
    sections = job_config.to_dict().items()
    options = {f"{name}.{option}": value for name, section in sections for option, value in section.items()}
    return {n: value for n, value in options.items() if n == "metrics.log_freq" or not n.startswith(_OF_THE_MACHINE)}


def require_config_module(args: list[str]) -> None:
    """Says what is missing where torchtitan would only say that it does not know `[lora]` or `"lora"`.

    Args:
        args: The command line, as torchtitan's ConfigManager gets it.

    Raises:
        ValueError: The TOML file uses LoRA, but no `job.custom_config_module` brings its section.
    """
    manager = ConfigManager()
    toml = manager._maybe_load_toml(args) or {}
    uses_lora = "lora" in toml or "lora" in toml.get("model", {}).get("converters", [])
    if uses_lora and manager._maybe_add_custom_config(args, toml) is manager.config_cls:
        raise ValueError(MISSING_CONFIG_MODULE)


def full_phase_result(job_config) -> str:
    """The folder of the last checkpoint of phase 1, the base of phase 2."""
    folder = job_config.checkpoint.folder + FULL_PHASE_FOLDER
    return os.path.join(job_config.job.dump_folder, folder, f"step-{job_config.lora.full_phase.steps}")


def check_phase(job_config) -> None:
    """Refuses a job of two phases that was started where only the second would run.

    Raises:
        ValueError: The base is not the result of the first phase.
    """
    steps = job_config.lora.full_phase.steps
    if steps > 0 and job_config.checkpoint.initial_load_path != full_phase_result(job_config):
        raise ValueError(
            f"lora.full_phase.steps = {steps}: torchtitan's own entry trains one phase. Start the job with "
            "`torchrun ... -m lora_converter.train`."
        )


def check_settings(job_config) -> None:
    """Refuses settings of the host that cannot work with adapters, before any weight exists.

    Raises:
        ValueError: What was set, and what to do.
    """
    config = job_config.checkpoint
    path = config.initial_load_path or (job_config.model.hf_assets_path if config.initial_load_in_hf else None)
    adapter = job_config.lora.initial_adapter_path
    if not config.enable and (path or adapter):
        option = "checkpoint.initial_load_path" if path else "lora.initial_adapter_path"
        raise ValueError(f"{option} is set, but nothing is loaded with checkpoint.enable = false. Set it to true.")
    if path and not os.path.isdir(path):
        option = "checkpoint.initial_load_path" if config.initial_load_path else "model.hf_assets_path"
        raise ValueError(f"{option} = {path!r}: there is no such folder. Name the folder of the pretrained base.")
    if adapter and not os.path.isdir(adapter):
        raise ValueError(
            f"lora.initial_adapter_path = {adapter!r}: there is no such folder. Name a step folder or a PEFT directory."
        )
    if job_config.lora.full_phase.steps > 0 and not config.enable:
        raise ValueError("lora.full_phase hands its result on as a checkpoint: set checkpoint.enable = true.")
    parallelism = job_config.parallelism
    if (
        job_config.lora.full_phase.steps > 0
        and config.initial_load_in_hf
        and parallelism.tensor_parallel_degree > 1
        and parallelism.data_parallel_shard_degree != 1
    ):
        raise ValueError(
            "lora.full_phase with checkpoint.initial_load_in_hf = true under FSDP2 x TP: torchtitan 0.2.2 loads the "
            "base of that phase, and may give it other rows of q and k there. Convert the base to DCP first."
        )
    if path and not config.initial_load_model_only:
        raise ValueError(
            "checkpoint.initial_load_model_only = false: the base's optimizer state does not fit the adapters. "
            "Leave it at true; a LoRA run resumes from its own checkpoint folder."
        )
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true: the adapters' gradients are complete only after "
            "the backward. Leave it at false; they take little memory."
        )
    unknown = [name for name in config.exclude_from_loading if name and name not in PARTS]
    if unknown:
        raise ValueError(
            f"checkpoint.exclude_from_loading: {', '.join(map(repr, unknown))} is no part of a checkpoint; the parts "
            f"are {', '.join(PARTS)}."
        )
    if job_config.lora.save_merged and job_config.lora.full_phase.steps > 0:
        raise ValueError(
            "lora.save_merged = true with lora.full_phase: the adapters' base is that phase's result, a DCP folder, "
            "and there is no Hugging Face folder to merge into. Leave save_merged at false."
        )
    if job_config.lora.save_merged and not (config.last_save_in_hf and config.initial_load_in_hf):
        raise ValueError(
            "lora.save_merged = true merges the last step's PEFT directory into a Hugging Face base: set "
            "checkpoint.last_save_in_hf = true and checkpoint.initial_load_in_hf = true."
        )
    if job_config.lora.save_merged and config.initial_load_in_hf_quantized:
        raise ValueError(
            "lora.save_merged = true with checkpoint.initial_load_in_hf_quantized = true: quantized weights cannot be "
            "merged into. Leave save_merged at false and merge into an unquantized copy with `lora-converter merge`."
        )
    if config.last_save_in_hf and not path:
        raise ValueError(
            "checkpoint.last_save_in_hf = true: the adapter would be written without its base, which has no source and "
            "is stored nowhere else. Set checkpoint.initial_load_path, or leave it at false."
        )
    if config.last_save_in_hf and not config.last_save_model_only:
        raise ValueError(
            "checkpoint.last_save_in_hf = true makes the last step a PEFT directory, which cannot hold the optimizer: "
            "set checkpoint.last_save_model_only = true."
        )
