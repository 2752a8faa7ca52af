"""The torchtitan side: the only folder that imports torchtitan.

`job.custom_config_module = "lora_converter.titan"` makes torchtitan look up `JobConfig` here, which also registers
the `"lora"` converter. The look-up is lazy, so that `cpu.prepare` can run before torchtitan is first imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_converter.titan.converter import LoRAConverter
    from lora_converter.titan.job_config import JobConfig

__all__ = ["JobConfig", "LoRAConverter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_converter.titan.converter import LoRAConverter
    from lora_converter.titan.job_config import JobConfig, compare_jobs_over_ranks

    compare_jobs_over_ranks()
    return {"JobConfig": JobConfig, "LoRAConverter": LoRAConverter}[name]
