"""Layers that differ by their adapters, compiled: each kind has its graphs, and none is made twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import TINY, build, finish
from parity import COMPILE, TOKENS, VALIDATION
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

from lora_converter import disable_adapter

pytestmark = pytest.mark.slow
LAYERS = 10
RANKS = [x for layer in range(LAYERS) for x in (f"layers.{layer}.attention.wq", str(layer + 1))]
JOB = [*COMPILE, "--compile.backend=eager", "--model.flavor=ten", "--checkpoint.initial_load_path=", *VALIDATION]


@pytest.fixture(autouse=True)
def ten_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(llama3_args, "ten", TransformerModelArgs(**{**TINY, "n_layers": LAYERS}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limits = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        yield


def test_ten_kinds_of_layers_train_and_validate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = build(tmp_path, *JOB, "--lora.target_modules=wq,wv", "--lora.rank_pattern", *RANKS)
    finish(run)
    assert len(run.losses) == 3
    assert "LoRA: 10 kinds of layers by their adapters: torch compiles up to 80 graphs for them." in caplog.text


def test_layers_of_one_kind_keep_torchs_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    limit = torch._dynamo.config.recompile_limit
    build(tmp_path, *JOB).trainer.close()
    assert torch._dynamo.config.recompile_limit == limit and "kinds of layers" not in caplog.text


def test_toggling_adapters_compiles_each_way_once(tmp_path: Path) -> None:
    run = build(tmp_path, *JOB, "--lora.target_modules=wq,wv", "--lora.rank_pattern", *RANKS)
    run.trainer.checkpointer.load()
    model, tokens = run.trainer.model_parts[0].eval(), torch.arange(TOKENS).unsqueeze(0)

    def both_ways() -> int:
        with torch.no_grad():
            model(tokens)
            with disable_adapter(model):
                model(tokens)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    first = both_ways()
    assert first == LAYERS + 1  # without adapters all layers are of one kind
    assert [both_ways() for _ in range(3)] == [first] * 3
    run.trainer.close()
