"""A LoRA job in plain values: what a run needs to know of the host's configuration.

No postponed annotations here: torchtitan merges `RunConfig` into its job config by the types of its fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lora_converter.config import LoRAConfig

AS_RELEASED = "as-released"
BASE_FORMATS = ("", "nf4", AS_RELEASED)
"""What frozen weights may be packed as; the first is not at all."""


@dataclass
class RunConfig(LoRAConfig):
    """The adapter's settings, where it starts from, and what is written at the end."""

    initial_adapter_path: str = ""
    """
    Adapters that this run starts from: a step folder of an earlier LoRA run (DCP), or a PEFT directory, whose rank,
    alpha, rsLoRA and targets hold where [lora] leaves them at their defaults. Only adapters are read: the base comes
    from checkpoint.initial_load_path, and optimizer and step are fresh. Not loaded when the run resumes from its own
    checkpoint folder.
    """

    accept_other_base: bool = False
    """
    Resume, or start from initial_adapter_path, although the base's fingerprint, its format or the other converters are
    not those that the adapters were trained on. Without it that is an error.
    """

    save_merged: bool = False
    """
    At the end also write base + adapter as a Hugging Face directory, checkpoint/merged-N beside the PEFT directory
    step-N. Needs checkpoint.last_save_in_hf and a base in Hugging Face's format.
    """

    base_format: str = ""
    """
    Keep the frozen weights of linears and experts packed: "nf4" (4.25 bits a weight, bitsandbytes' NF4), "as-released"
    (as the Hugging Face folder has them: MXFP4, fp8 in blocks, NF4), or "" (in the dtype they are computed in).
    """

    loss_chunk_tokens: int = -1
    """
    The loss takes a frozen output head this many tokens at a time, and logits of all tokens never exist. -1 chooses by
    the vocabulary, 0 is the host's own loss.
    """

    def __post_init__(self) -> None:
        for name in ("exclude_modules", "train_also", "new_tokens"):
            if getattr(self, name) == [""]:  # what `--lora.exclude_modules ""` gives: torchtitan splits at commas
                setattr(self, name, [])
        if not isinstance(self.initial_adapter_path, str):
            raise ValueError(f"lora.initial_adapter_path = {self.initial_adapter_path!r}: must be a string.")
        for name in ("accept_other_base", "save_merged"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"lora.{name} = {getattr(self, name)!r}: must be true or false.")
        if self.base_format not in BASE_FORMATS:
            allowed = ", ".join(map(repr, BASE_FORMATS))
            raise ValueError(f"lora.base_format = {self.base_format!r}: must be one of {allowed}.")
        chunk = self.loss_chunk_tokens
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < -1:
            raise ValueError(f"lora.loss_chunk_tokens = {chunk!r}: must be a number of tokens, 0 or -1.")
        super().__post_init__()


@dataclass(frozen=True)
class Base:
    """Where the base weights come from.

    Attributes:
        path: A folder.
        format: DCP, or a Hugging Face model.
        quantized: The Hugging Face folder's weights are quantized, and are read dequantized.
    """

    path: str
    format: Literal["dcp", "hf"] = "dcp"
    quantized: bool = False


@dataclass(frozen=True)
class Job:
    """One LoRA run.

    Attributes:
        model: The host's name of the architecture.
        flavor: The host's name of its size.
        seed: Decides the adapters' initial values.
        steps: How many the run has.
        folder: Of its steps, `step-N`.
        base: None for random weights, which every step then stores.
        exports_peft: The last step is a PEFT directory.
        export_dtype: Of what that holds.
        custom_import: Module that registers the model with the host; empty if the host has it.
        not_loaded: Parts of a step that are left out of loading: "optimizer", "dataloader", ...
        saves: Whether the run writes to its folder at all.
        data: What its batches are made of, option -> value: under other values a step's place in the data is none.
        tokens: Token -> id, of those whose rows of the embedding and head train.
        tokenizer: Folder of the tokenizer that they were added to.
        base_rows: How many rows the base's embedding has; the model may have more. 0 without `tokens`.
        converters: What else changes what the host's model computes, by name, in order: float8, fake quantization ...
    """

    model: str
    flavor: str
    config: RunConfig
    seed: int
    steps: int
    folder: str
    base: Base | None = None
    exports_peft: bool = False
    export_dtype: torch.dtype = torch.float32
    custom_import: str = ""
    not_loaded: tuple[str, ...] = ()
    saves: bool = True
    data: dict[str, Any] = field(default_factory=dict)
    converters: tuple[str, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    base_rows: int = 0
    tokenizer: str = ""
