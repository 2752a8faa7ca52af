"""Mixtures of experts on torchtitan 0.3, with adapters on linears and on routed experts."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experts03 import BACKENDS, CHECKS, JOBS, MIXTURES, figures, filled, products, save_base
from hf_tiny import tiny_deepseek_v3, tiny_qwen3_moe
from jobs03 import SEQ_LEN, build, config, feed_global_batches, finish, global_batch, whole_adapter
from launch import launch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_converter.names import stable_hash

THEIRS: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_moe": tiny_qwen3_moe, "deepseek_v3": tiny_deepseek_v3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of transformers', and PEFT directories of one rank."""
    path = tmp_path_factory.mktemp("experts")
    for model in MIXTURES:
        THEIRS[model]().save_pretrained(path / f"{model} in HF")
        run = filled(path / f"{model} filled", model, path / f"{model} in HF")
        run.trainer.checkpointer.run.write_peft(str(path / f"{model} in PEFT"))
        run.trainer.close()
    return path


@pytest.fixture(scope="module")
def references(folder: Path) -> Path:
    """The same, with bases of torchtitan's, and runs of one rank."""
    for model in MIXTURES:
        base = save_base(model, folder / model)
        for job, dtype in (("experts", "fp32"), ("experts", "bf16"), ("linears", "fp32")):
            name = f"{model} {job} {dtype}"
            torch.save(figures(folder / name, base, model, job, dtype), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def verdicts(references: Path) -> dict[str, dict]:
    """Of all checks."""
    folder = references / "ranks"
    folder.mkdir()
    return launch("../titan03/experts03.py", ranks=2, folder=folder, checks=list(CHECKS))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_do_what_one_does(name: str, verdicts: dict[str, dict]) -> None:
    assert not verdicts[name]["error"], verdicts[name]["error"]


def test_both_backends_give_one_rank_the_same_run(references: Path, tmp_path: Path) -> None:
    expected = torch.load(references / "deepseek_v3 experts fp32.pt")
    base = references / "deepseek_v3" / "checkpoint" / "step-1"
    options = {"parallelism__spmd_backend": BACKENDS[1]}
    found = figures(tmp_path, base, "deepseek_v3", "experts", "fp32", **options)
    assert found["losses"] == expected["losses"] and found["norms"] == expected["norms"]


# PEFT looks for the keys of its patterns among the modules that it adapts, and not among the parameters.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("model", MIXTURES)
def test_peft_gives_the_runs_logits(model: str, folder: Path, tmp_path: Path) -> None:
    run = filled(tmp_path, model, folder / f"{model} in HF")
    tokens = global_batch(0)[:2, :SEQ_LEN]
    part, positions = run.trainer.model_parts[0].eval(), torch.arange(SEQ_LEN).expand(2, -1)
    with torch.no_grad():
        masks = part.get_attention_masks(positions)
        with products("fp32"):
            expected = part.lm_head(part(tokens, attention_masks=masks, positions=positions))
        untouched = THEIRS[model]()(input_ids=tokens).logits
        theirs = PeftModel.from_pretrained(THEIRS[model](), folder / f"{model} in PEFT").eval()
        found = theirs(input_ids=tokens).logits
    run.trainer.close()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert (found - untouched).abs().max() > 1e-1


def test_initial_values_are_those_of_0_2_2(tmp_path: Path) -> None:
    """By its names of the weights, expert by expert."""
    run = build(config(tmp_path, JOBS["experts"], model="deepseek_v3"))
    found = whole_adapter(run)
    seed, bound = run.trainer.config.debug.seed, 1 / math.sqrt(64)
    for weight in ("w1", "w3"):
        for expert in range(4):
            generator = torch.Generator().manual_seed(stable_hash(f"{seed}:layers.1.moe.experts.{weight}:{expert}"))
            expected = torch.empty(64, 3).uniform_(-bound, bound, generator=generator)
            assert torch.equal(found[f"layers.1.moe.experts.{weight}_lora_a"][expert], expected)
    run.trainer.close()


def test_the_bias_that_balances_load_stays_the_bases(tmp_path: Path) -> None:
    run = build(config(tmp_path, JOBS["experts"], model="deepseek_v3", training__steps=2))
    feed_global_batches(run)
    finish(run)
    biases = [b for name, b in run.trainer.model_parts[0].named_buffers() if name.endswith("expert_bias_E")]
    assert len(biases) == 2 and not any(bias.any() for bias in biases)


def test_experts_are_named_as_on_0_2_2(tmp_path: Path) -> None:
    run = build(config(tmp_path, {"target_modules": ["layers.1.moe.experts.w1"]}, model="deepseek_v3"))
    assert list(whole_adapter(run)) == [f"layers.1.moe.experts.w1_lora_{half}" for half in "ab"]
    run.trainer.close()
    own = "inner_experts.w1_EFD"
    with pytest.raises(ValueError, match=f"experts have w1_EFD, w2_EDF, w3_EFD, as in '{own}'"):
        build(config(tmp_path, {"target_modules": ["wkv"]}, model="deepseek_v3"))
    run = build(config(tmp_path, {"target_modules": [f"layers.1.*.{own}"]}, model="deepseek_v3"))
    assert len(whole_adapter(run)) == 2
    run.trainer.close()
