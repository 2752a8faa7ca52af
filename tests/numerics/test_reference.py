"""Training against code that nobody here wrote: transformers' model, PEFT's adapters, a plain loop, torch's AdamW."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Run, adapter_state, build, finish
from hf_tiny import tiny_llama
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


def peft_twin(run: Run, model: PreTrainedModel | None = None, saved: list[str] | None = None) -> torch.nn.Module:
    """transformers' model with PEFT's adapters, A as in the run. B starts at zero, so row orders do not matter."""
    targets = [name.split(".")[1] for name in HF_NAMES.values()]
    config = LoraConfig(r=4, lora_alpha=32, target_modules=targets, modules_to_save=saved)
    model = get_peft_model(model or tiny_llama(), config)
    twin = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter_state(run).items():
            if "lora" not in name:
                continue
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


HF_TRAINED = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    **{f"layers.{layer}.attention_norm": f"model.layers.{layer}.input_layernorm" for layer in range(4)},
}


def test_what_trains_in_full_ends_where_pefts_modules_to_save_do(hf_base: Path, tmp_path: Path) -> None:
    """Two groups in torch's own AdamW: another rate and no decay for the modules, decay for the adapters."""
    steps = 8
    run = build(
        tmp_path,
        f"--checkpoint.initial_load_path={hf_base}",
        "--checkpoint.initial_load_in_hf",
        f"--training.steps={steps}",
        "--optimizer.weight_decay=0.1",
        "--optimizer.eps=1e-5",
        "--lora.train_also=tok_embeddings,output,norm,layers.*.attention_norm",
        "--lora.train_also_lr=2e-4",
    )
    model = peft_twin(run, saved=list(HF_TRAINED.values()))
    rate = run.trainer.job_config.optimizer.lr
    finish(run)

    groups: list[list[torch.Tensor]] = [[], []]
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups["modules_to_save" in name].append(param)
    assert len(groups[1]) == len(HF_TRAINED)
    adapters, own = groups
    optimizer = torch.optim.AdamW(
        [{"params": adapters, "weight_decay": 0.1}, {"params": own, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    losses = []
    for (inputs, labels), lr in zip(run.batches, run.lrs, strict=True):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * 2e-4 / rate
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapters, *own], 1.0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=1e-5, atol=0)
    twin, found = dict(model.named_modules()), adapter_state(run)
    for ours, theirs in HF_TRAINED.items():
        expected = twin[f"base_model.model.{theirs}"].modules_to_save["default"].weight
        # A rate of 2e-4 moves each weight by up to 1.6e-3; one in a hundred of that is the bound.
        torch.testing.assert_close(found[f"{ours}.weight"], expected.detach(), rtol=0, atol=1.6e-5)
