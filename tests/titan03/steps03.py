"""Steps of runs on torchtitan 0.3: what is in them, and that another layout or backend goes on from one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jobs03 import (
    STEPS,
    Run,
    build,
    config,
    feed_global_batches,
    fill_b_when_loaded,
    finish,
    losses_of,
    start_process_group,
    whole_adapter,
)
from launch import main
from parity03 import CP2, FSDP2, PP2, TP2, Row, options, relative

from lora_converter.dcp.reader import read_metadata
from lora_converter.ranks import on_first_rank

SAVED = STEPS - 2
LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2, "CP2": CP2}
CHAIN = [
    ("FSDP2", "spmd_types"),
    ("TP2", "spmd_types"),
    ("PP2", "partial_dtensor"),
    ("CP2", "spmd_types"),
    ("TP2", "partial_dtensor"),
    ("FSDP2", "partial_dtensor"),
]


def pairs() -> Iterator[tuple[str, str]]:
    """Who saves a step, and who goes on from it; the last one's is the first one's."""
    names = [f"{layout} {backend}" for layout, backend in CHAIN]
    yield from zip(names, names[1:] + names[:1], strict=True)


FROM_TO = {f"{saved} to {resumed}": (saved, resumed) for saved, resumed in pairs()}


def run_on(name: str, folder: Path, bases: Path, **more: Any) -> Run:
    """The job of the parity table, on a layout and backend."""
    layout, backend = name.split()
    run = build(config(folder, **options(Row(2, LAYOUTS[layout]), bases, backend), **more))
    feed_global_batches(run)
    fill_b_when_loaded(run)
    return finish(run)


def save(name: str, folder: Path) -> dict[str, Any]:
    """A whole run, which leaves the step that the other one goes on from."""
    run = run_on(name, folder, folder.parent.parent, checkpoint__interval=SAVED)
    stored = read_metadata(folder / "checkpoint" / f"step-{SAVED}").state_dict_metadata
    model = [key for key in stored if not key.startswith(("optimizer.", "dataloader", "lr_scheduler", "train_state"))]
    assert sorted(model) == sorted(whole_adapter(run)), "not the adapters alone are stored, by canonical names"
    moments = {key.removeprefix("optimizer.state.") for key in stored if key.endswith(".exp_avg")}
    assert moments == {f"{key}.exp_avg" for key in model}
    return {"losses": losses_of(run), "grad_norms": run.grad_norms}


def resume(saved: str, resumed: str, folder: Path) -> dict[str, float]:
    """The last two steps again, on another layout."""
    bases, steps = folder.parent.parent, folder / "checkpoint"
    source = folder.parent / saved / "checkpoint"
    on_first_rank(lambda: (shutil.copytree(source, steps), shutil.rmtree(steps / f"step-{STEPS}")))
    # torchtitan's loader of text refuses another number of ranks; these rows do not come from it.
    run = run_on(resumed, folder, bases, checkpoint__exclude_from_loading=["dataloader"])
    reference = torch.load(bases / "spmd_types.pt", weights_only=True)
    changed = {n: (value - reference["final"][n]).norm() for n, value in whole_adapter(run).items()}
    return {
        "loss": relative(losses_of(run), reference["losses"][SAVED:]),
        "grad_norm": relative(run.grad_norms, reference["grad_norms"][SAVED:]),
        "adapter": max((difference / reference["final"][n].norm()).item() for n, difference in changed.items()),
    }


CHECKS: dict[str, Any] = {
    **{saved: (lambda folder, name=saved: save(name, folder)) for saved, _ in FROM_TO.values()},
    **{name: (lambda folder, pair=pair: resume(*pair, folder)) for name, pair in FROM_TO.items()},
}

if __name__ == "__main__":
    main(CHECKS, start_process_group)
