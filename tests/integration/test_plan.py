"""`lora-converter plan` beside runs: of the debug jobs on this CPU, and of an 8B on an H100."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_measure import allocated
from harness import CONFIG, ROOT, TINY_ARGS, build, finish
from held import held
from planned import planned

from lora_converter.plan import Estimate
from lora_converter.titan.head import without_logits

BF16 = "--training.mixed_precision_param=bfloat16"
NO_AC, OP_SAC, FULL_AC = (
    ["--activation_checkpoint.mode=none"],
    ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
    ["--activation_checkpoint.mode=full"],
)
MOE = ["--model.name=deepseek_v3", "--model.flavor=debugmodel", "--lora.target_modules=all-linear,experts"]

JOBS = {
    "none": NO_AC,
    "op-SAC, bf16": [*OP_SAC, BF16],
    "full": FULL_AC,
    "none, dropout, rank 16, bf16": [*NO_AC, BF16, "--lora.dropout=0.1", "--lora.rank=16"],
    "MoE": [*NO_AC, *MOE],
}


def kept_for_backward(trainer: Any) -> int:
    """Bytes that a forward leaves, up to the hidden states, by the record of the CPU allocator."""
    training = trainer.job_config.training
    tokens = torch.zeros(training.local_batch_size, training.seq_len, dtype=torch.int64)
    model = trainer.model_parts[0]
    with without_logits(trainer.model_parts), trainer.train_context(), trainer.maybe_enable_amp:
        model(tokens)  # what is made once and for good
        model.output.handed_on = None  # so that nothing of it goes while the next one is counted
        gc.collect()  # the trainer has switched it off
        with allocated("cpu") as found:
            hidden = model(tokens)
        assert hidden.shape[-1] == trainer.model_args.dim
    return found.left


@pytest.fixture(scope="module")
def plans() -> dict[str, Estimate]:
    jobs = [(str(CONFIG), [*TINY_ARGS, "--lora.rank=4", *options], 1, False) for options in JOBS.values()]
    return dict(zip(JOBS, planned(*jobs), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_a_plan_has_the_bytes_of_a_run(job: str, plans: dict[str, Estimate], tmp_path: Path) -> None:
    """Parameters, gradients and the optimizer's state exactly; what the forward keeps within a tenth."""
    run = build(tmp_path, "--checkpoint.no-enable", "--checkpoint.initial_load_path=", "--training.steps=1", *JOBS[job])
    kept, plan = kept_for_backward(run.trainer), plans[job]
    finish(run)
    assert {kind: plan.sizes[kind] for kind in held(run.trainer)} == held(run.trainer)
    assert plan.saved == pytest.approx(kept, rel=0.1)
    params = [param for part in run.trainer.model_parts for param in part.parameters()]
    assert plan.trained == sum(param.numel() for param in params if param.requires_grad)
    assert plan.trained + plan.frozen == sum(param.numel() for param in params)


ON_AN_H100 = {
    36.0: [*OP_SAC, "--compile.enable"],
    24.5: [*FULL_AC, "--compile.enable"],
    32.3: [*FULL_AC, "--compile.no-enable"],
}
"""GiB of docs/performance.md -> options."""


@pytest.mark.slow
def test_the_peaks_of_an_8b_are_those_measured_on_an_h100() -> None:
    """Within 15 %. 0.2 %, 0.1 % and 5.6 % were found."""
    options = ["--lora.loss_chunk_tokens=0", "--training.seq_len=8192"]
    config = str(ROOT / "configs" / "llama3_8b_lora.toml")
    found = planned(*((config, [*options, *mode], 1, True) for mode in ON_AN_H100.values()))
    assert [plan.peak / 2**30 for plan in found] == [pytest.approx(peak, rel=0.15) for peak in ON_AN_H100]
