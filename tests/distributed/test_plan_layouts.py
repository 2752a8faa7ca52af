"""A plan's parameters, gradients and optimizer state are those of a run, on every layout (`held_layouts.py`)."""

from typing import Any

import held_layouts
import pytest
from harness import CONFIG, TINY_ARGS
from launch import launch
from planned import planned

from lora_converter.plan import Estimate


@pytest.fixture(scope="module")
def plans() -> dict[str, Estimate]:
    layouts = held_layouts.LAYOUTS
    jobs = [(str(CONFIG), [*TINY_ARGS, "--lora.rank=4", *layout], 2, False) for layout in layouts.values()]
    return dict(zip(layouts, planned(*jobs), strict=True))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch("held_layouts.py", ranks=2, folder=tmp_path_factory.mktemp("held"), checks=list(held_layouts.LAYOUTS))


@pytest.mark.parametrize("layout", held_layouts.LAYOUTS)
def test_a_plan_has_the_bytes_of_a_rank(layout: str, plans: dict[str, Estimate], verdicts: dict[str, Any]) -> None:
    assert not verdicts[layout]["error"], verdicts[layout]["error"]
    held = verdicts[layout]["figures"]
    assert {kind: plans[layout].sizes[kind] for kind in held} == held
