"""Training against code that nobody here wrote: transformers' model, PEFT's adapters, a plain loop, torch's AdamW."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Run, adapter_state, build, finish
from hf_models import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

STEPS = 20
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def peft_twin(run: Run, model: PreTrainedModel | None = None) -> torch.nn.Module:
    """transformers' model with PEFT's adapters, A as in the run. B starts at zero, so row orders do not matter."""
    config = LoraConfig(r=4, lora_alpha=32, target_modules=[name.split(".")[1] for name in HF_NAMES.values()])
    model = get_peft_model(model or tiny_llama(), config)
    twin = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter_state(run).items():
            _, layer, block, linear, factor, _ = name.split(".")
            target = f"layers.{layer}.{HF_NAMES[f'{block}.{linear}']}.lora_{factor[-1].upper()}.default.weight"
            assert factor == "lora_a" or not value.any()
            twin[f"base_model.model.model.{target}"].copy_(value)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_transformers_with_peft_in_a_plain_loop(
    hf_base: Path, tmp_path: Path, accumulation: int
) -> None:
    run = build(
        tmp_path,
        f"--checkpoint.initial_load_path={hf_base}",
        "--checkpoint.initial_load_in_hf",
        f"--training.steps={STEPS}",
        f"--training.global_batch_size={4 * accumulation}",
    )
    model = peft_twin(run)
    finish(run)

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batches = run.batches[step * accumulation : (step + 1) * accumulation]
        inputs, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        optimizer.param_groups[0]["lr"] = run.lrs[step]
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())

    assert len(run.losses) == STEPS and losses[-1] < losses[0] - 0.5
    # fp32 with other summation orders: 1e-7 per step, grown over 20 steps.
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=1e-5, atol=0)
