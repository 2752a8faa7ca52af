"""`[chat]`: what is trained of conversations, and how they become rows.

No postponed annotations here: torchtitan merges this into its job config by the types of its fields.
"""

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_converter.config import is_number

TrainOn = Literal["assistant", "last", "each", "all"]
Packing = Literal["documents", "none"]
TooLong = Literal["drop", "error", "truncate"]

_CHOICES = {"train_on": TrainOn, "packing": Packing, "too_long": TooLong}


def check_choice(name: str, value: object) -> None:
    """Raises ValueError if it is no value of this setting."""
    if value not in (allowed := get_args(_CHOICES[name])):
        raise ValueError(f"chat.{name} = {value!r}: must be one of {', '.join(allowed)}.")


DATE = "2025-01-01"
"""The same one whenever the data are made, so that they are the same data."""


@dataclass
class ChatConfig:
    """`[chat]`, with training.dataset = "chat"."""

    template: str = ""
    """A file with a chat template; else chat_template.jinja or tokenizer_config.json of model.hf_assets_path."""

    template_args: dict[str, str] = field(default_factory=dict)
    """Handed to the template: a table, for example enable_thinking = "false". "true" and "false" become booleans."""

    date: str = DATE
    """What templates write as today's date: YYYY-MM-DD."""

    train_on: str = "assistant"
    """
    What the loss is on: "assistant" (every assistant turn), "last" (the last one), "each" (one example per assistant
    turn, trained on that turn), "all" (every token).
    """

    packing: str = "documents"
    """
    "documents": rows of several conversations that cannot see each other (FlexAttention); "none": one per row, padded.
    """

    too_long: str = "drop"
    """Conversations that are longer than training.seq_len: "drop", "error" or "truncate"."""

    epochs: float = 0.0
    """Above 0 it sets training.steps."""

    validation_split: float = 0.0
    """Part of the records that is kept for validation, chosen by a hash of each record."""

    cache_path: str = ""
    """Where the tokenised conversations are kept; job.dump_folder/chat_cache if empty."""

    def __post_init__(self) -> None:
        for name in _CHOICES:
            check_choice(name, getattr(self, name))
        if not is_number(self.epochs) or self.epochs < 0:
            raise ValueError(f"chat.epochs = {self.epochs!r}: must be at least 0.")
        if not is_number(self.validation_split) or not 0 <= self.validation_split < 1:
            raise ValueError(f"chat.validation_split = {self.validation_split!r}: must be at least 0 and below 1.")
        if not _is_date(self.date):
            raise ValueError(f'chat.date = {self.date!r}: must be a day in quotes, as "{DATE}".')
        if not isinstance(self.template_args, dict):
            raise ValueError(f"chat.template_args = {self.template_args!r}: must be a table.")

    @property
    def template_values(self) -> dict[str, Any]:
        """`template_args` as the template gets them."""
        words = {"true": True, "false": False}
        return {n: words.get(v.lower(), v) if isinstance(v, str) else v for n, v in self.template_args.items()}


def _is_date(value: Any) -> bool:
    try:
        return datetime.date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False
