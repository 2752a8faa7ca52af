"""torchtitan's JobConfig with a `[lora]` section.

torchtitan merges this class into its own when `job.custom_config_module` names `lora_converter.titan`. A project
with a config module of its own derives from this one. No postponed annotations here: the merge reads types.
"""

from dataclasses import dataclass, field

from lora_converter.chat.settings import ChatConfig
from lora_converter.run.job import RunConfig


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
class LoRA(RunConfig):
    """`[lora]`: the adapter's settings, where it starts from, what is written at the end, and a phase before."""

    full_phase: FullPhase = field(default_factory=FullPhase)
    """A phase before, in which every weight is trained."""


@dataclass
class JobConfig:
    """What this package adds to torchtitan's JobConfig."""

    lora: LoRA = field(default_factory=LoRA)
    """Low-rank adapters; used when model.converters has "lora"."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    """Conversations; used when training.dataset or validation.dataset is "chat"."""
