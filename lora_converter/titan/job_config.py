"""torchtitan's JobConfig with a `[lora]` section.

torchtitan merges this class into its own when `job.custom_config_module` names `lora_converter.titan`. A project
with a config module of its own derives from this one. No postponed annotations here: the merge reads types.
"""

from dataclasses import dataclass, field

from torchtitan.config import ConfigManager

from lora_converter.config import LoRAConfig

MISSING_CONFIG_MODULE = (
    "LoRA is used, but job.custom_config_module is not set, so there is no [lora] section: "
    'add custom_config_module = "lora_converter.titan" under [job].'
)


@dataclass
class LoRA(LoRAConfig):
    """`[lora]`: the adapter's settings, and where it starts from."""

    initial_adapter_path: str = ""
    """
    Step folder of an earlier LoRA run (DCP) whose adapters this run starts from. Only adapters are read: the base
    comes from checkpoint.initial_load_path, and optimizer and step are fresh. Ignored when the run resumes from its
    own checkpoint folder.
    """

    def __post_init__(self) -> None:
        if self.exclude_modules == [""]:  # what `--lora.exclude_modules ""` gives: torchtitan splits at commas
            self.exclude_modules = []
        super().__post_init__()


@dataclass
class JobConfig:
    """What this package adds to torchtitan's JobConfig."""

    lora: LoRA = field(default_factory=LoRA)
    """Low-rank adapters; used when model.converters has "lora"."""


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
