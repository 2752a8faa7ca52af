"""Two gloo ranks: what rank 0 holds after a step, for `test_plan_layouts.py`."""

from collections.abc import Callable
from pathlib import Path

from harness import build, finish
from held import held
from launch import main
from parity import CP2, DDP2, EP2, FSDP2, PP2, TP2

LAYOUTS = {
    "FSDP2": FSDP2,
    "TP2": TP2,
    "PP2": PP2,
    "CP2": CP2,
    "DDP2": DDP2,
    "EP2": [*EP2, "--model.name=deepseek_v3", "--model.flavor=debugmodel", "--lora.target_modules=all-linear,experts"],
}


def check(layout: str) -> Callable[[Path], dict[str, int]]:
    """The bytes of each kind."""

    def run(folder: Path) -> dict[str, int]:
        options = ["--checkpoint.no-enable", "--checkpoint.initial_load_path=", "--training.steps=1"]
        found = build(folder, *options, *LAYOUTS[layout])
        finish(found)
        return held(found.trainer)

    return run


CHECKS = {layout: check(layout) for layout in LAYOUTS}

if __name__ == "__main__":
    main(CHECKS)
