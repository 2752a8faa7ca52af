"""What a LoRA job adds to torchtitan's metrics."""

from typing import Any


def log_phase(trainer: Any, number: int) -> None:
    """Adds `lora/phase` to what the trainer logs at each step."""
    log = trainer.metrics_processor.log

    def log_with_phase(*args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        log(*args, extra_metrics={**(extra_metrics or {}), "lora/phase": number}, **kwargs)

    trainer.metrics_processor.log = log_with_phase
