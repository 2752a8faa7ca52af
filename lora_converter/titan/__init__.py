"""The torchtitan 0.2.2 side: the only folder that imports torchtitan.

`job.custom_config_module = "lora_converter.titan"` makes torchtitan look up `JobConfig` here. That is the one early
moment of ours under torchtitan's own entry, so it registers the `"lora"` converter and installs the changes to the host
(`installed.py`). Reading any other name installs nothing. All are looked up lazily, so that CPU ranks can be chosen
before torchtitan is first imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_converter.titan.converter import LoRAConverter
    from lora_converter.titan.installed import install
    from lora_converter.titan.job_config import JobConfig

__all__ = ["JobConfig", "LoRAConverter", "install"]


def __getattr__(name: str) -> Any:
    if name == "JobConfig":
        from lora_converter.titan import converter as converter  # registers "lora"
        from lora_converter.titan.installed import install
        from lora_converter.titan.job_config import JobConfig

        install()
        return JobConfig
    if name == "LoRAConverter":
        from lora_converter.titan.converter import LoRAConverter

        return LoRAConverter
    if name == "install":
        from lora_converter.titan.installed import install

        return install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
