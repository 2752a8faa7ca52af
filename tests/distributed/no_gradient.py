"""Two gloo ranks: a parameter that never got a gradient starts when it gets one, in a resumed run as in a whole one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Run, build, finish
from launch import main
from parity import losses_of
from tiny_models import base_options
from trouble import LAYOUTS

from lora_converter.adapted import adapted_modules

STEPS = ["--checkpoint.interval=2", "--training.steps=4", "--checkpoint.keep_latest_k=0"]


def cut(run: Run, *, until: int) -> None:
    """wq of layer 1 leaves its adapter out, in the steps up to `until`. Another rank's stage may have it."""
    for module in (m for part in run.trainer.model_parts for m in adapted_modules(part)):
        if module.lora_fqn == "layers.1.attention.wq":
            with_adapter = module.forward

            def forward(x: torch.Tensor, module: Any = module, with_adapter: Any = with_adapter) -> torch.Tensor:
                module.lora_enabled = run.trainer.step > until
                try:
                    return with_adapter(x)
                finally:
                    module.lora_enabled = True

            module.forward = forward


def whole_and_resumed(folder: Path, *job: str) -> tuple[Run, Run]:
    """Four steps of which the first two leave the adapter out: in one go, and in two launches."""
    whole = build(folder / "whole", *job, *STEPS)
    cut(whole, until=2)
    finish(whole)
    first = build(folder / "parts", *job, *STEPS, "--training.steps=2", "--lr_scheduler.total_steps=4")
    cut(first, until=2)
    finish(first)
    second = build(folder / "parts", *job, *STEPS)
    finish(second)
    return whole, second


def resumes(folder: Path, layout: list[str]) -> None:
    whole, second = whole_and_resumed(folder, *base_options("llama3", folder.parent.parent), *layout)
    assert losses_of(second) == losses_of(whole)[2:], (losses_of(second), losses_of(whole))


CHECKS: dict[str, Callable[[Path], Any]] = {
    f"no gradient under {name}": lambda folder, layout=layout: resumes(folder, layout)
    for name, layout in LAYOUTS.items()
}

if __name__ == "__main__":
    main(CHECKS)
