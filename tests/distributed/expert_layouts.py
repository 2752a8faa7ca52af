"""Adapted experts on gloo ranks: which collectives run, merging on sharded weights, and steps that move between degrees
of expert parallelism.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from collectives import forward_and_backward, trainer
from harness import BASE_CONFIG, finish, full_state
from launch import main
from parity import EP2, EXPERTS_TOO, FSDP2, STEPS, TP2, build_row, fill_b, losses_of, relative, row
from tiny_models import base_options

from lora_converter import merge_adapter, unmerge_adapter
from lora_converter.adapted import adapted_modules
from lora_converter.experts import LoRAExperts

HALF = STEPS // 2
MODEL = "deepseek_v3"
TOKENS = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))

SAVED_ON = {
    "1 rank": row(1, model=MODEL, job=EXPERTS_TOO),
    "FSDP2": row(2, FSDP2, model=MODEL, job=EXPERTS_TOO),
    "EP2": row(2, FSDP2, EP2, model=MODEL, job=EXPERTS_TOO),
    "TP2": row(2, TP2, model=MODEL, job=EXPERTS_TOO),
}
REFERENCE = SAVED_ON["1 rank"].one_rank


def same_collectives(folder: Path, *layout: str, of_activations: tuple[str, ...] = ()) -> Any:
    """Experts with adapters send what experts without them send.

    Args:
        of_activations: Collectives to compare; all of them if left out. FSDP2 has the adapters' parameters in its own.
    """
    options = [*base_options(MODEL, folder.parent.parent), *layout]
    with trainer(folder / "lora", *options, *EXPERTS_TOO) as run:
        seen = forward_and_backward(run).counts
    with trainer(folder / "base", *options, config=BASE_CONFIG) as run:
        without = forward_and_backward(run).counts
    if of_activations:
        seen, without = ({k: n for k, n in counts.items() if k[0] in of_activations} for counts in (seen, without))
    assert without and seen == without, (seen, without)
    return {f"{name} {size}": count for (name, size), count in seen.items()}


def merging(folder: Path, *layout: str) -> float:
    """Merged experts give the output of base and update; taken back, the base is what it was, bit for bit."""
    options = [*base_options(MODEL, folder.parent.parent), *layout, *EXPERTS_TOO]
    with trainer(folder, *options) as run, torch.no_grad():
        fill_b(run)
        model = run.trainer.model_parts[0]
        assert sum(isinstance(module, LoRAExperts) for module in adapted_modules(model)) == 2
        before, out = full_state(run), whole(model(TOKENS))
        merge_adapter(model)
        merged = full_state(run)
        difference = (whole(model(TOKENS)) - out).abs().max().item()
        assert difference < 1e-4 * out.abs().max().item(), difference
        changed = {name for name in before if not torch.equal(before[name], merged[name])}
        assert {f"layers.{n}.moe.experts.{w}" for n in (1, 2) for w in ("w1", "w2", "w3")} <= changed
        unmerge_adapter(model)
        after = full_state(run)
        assert all(torch.equal(before[name], after[name]) for name in before)
    return difference


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def save(layout: str, bases: Path) -> None:
    """Trains to step 5 of 10 and stops."""
    options = [f"--training.steps={HALF}", f"--lr_scheduler.total_steps={STEPS}"]
    finish(build_row(SAVED_ON[layout], bases / "saved experts" / layout, bases, *options))


def resume(layout: str, saved_on: str, bases: Path) -> dict[str, float]:
    """Steps 6 to 10 have the losses of one rank that was never stopped."""
    options = ["--checkpoint.load_only", "--checkpoint.exclude_from_loading=dataloader"]
    run = build_row(SAVED_ON[layout], bases / "saved experts" / saved_on, bases, *options)
    finish(run)
    reference = torch.load(bases / f"{REFERENCE.key}.pt", weights_only=True)["losses"]
    difference = relative(losses_of(run), reference[HALF:])
    assert difference < 1e-5, difference
    return {"loss": difference}


def checks(bases: Path, ranks: int) -> dict[str, Any]:
    """Those of so many ranks: all saves before all resumes."""
    found: dict[str, Any] = {}
    if ranks == 2:
        found["the collectives under TP are those without adapters"] = lambda f: same_collectives(f, *TP2)
        found["what EP sends to experts is what it sends without adapters"] = lambda f: same_collectives(
            f, *FSDP2, *EP2, of_activations=("all_to_all_single", "alltoall_base_")
        )
        found["merging under EP"] = lambda f: merging(f, *FSDP2, *EP2)
        found["merging under TP"] = lambda f: merging(f, *TP2)
    here = [layout for layout, needs in SAVED_ON.items() if needs.ranks == ranks]
    for layout in here:
        found[f"save on {layout}"] = lambda _, layout=layout: save(layout, bases)
    for layout in here:
        for saved in SAVED_ON:
            found[f"resume on {layout} from {saved}"] = lambda _, to=layout, of=saved: resume(to, of, bases)
    return found


if __name__ == "__main__":
    main(checks(Path(sys.argv[1]).parent, int(os.environ["WORLD_SIZE"])))
