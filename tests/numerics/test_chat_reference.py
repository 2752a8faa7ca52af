"""Packed conversations against transformers and PEFT with one conversation at a time, in a plain loop."""

import itertools
from pathlib import Path

import pytest
import tiny_models  # noqa: F401  the flavor "tiny" of qwen3
import torch
import torch.nn.functional as F
from chat_job import chat_options
from harness import build, finish
from hf_tiny import tiny_llama, tiny_qwen3
from test_reference import peft_twin

STEPS, ROWS = 12, 2
MODELS = {"llama3": tiny_llama, "qwen3": tiny_qwen3}


@pytest.mark.parametrize("name", MODELS)
def test_loss_across_documents_a_packed_run_is_one_that_reads_one_conversation_at_a_time(
    name: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    run = build(
        tmp_path / "run",
        f"--model.name={name}",
        *chat_options(tmp_path / "chat", seq_len=128),
        f"--checkpoint.initial_load_path={tmp_path}/base",
        "--checkpoint.initial_load_in_hf",
        f"--training.steps={STEPS}",
        f"--training.local_batch_size={ROWS}",
        "--optimizer.eps=1e-5",
    )
    twin = peft_twin(run, model)
    finish(run)
    rows, per_row = run.trainer.dataloader.order.rows, []

    params = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        examples = [rows.examples(k) for k in range(step * ROWS, (step + 1) * ROWS)]
        per_row += map(len, examples)
        total, trained = torch.zeros(()), 0
        for number in itertools.chain(*examples):
            ids, mask = (torch.from_numpy(array.astype("int64")) for array in rows.dataset.example(number))
            labels = torch.where(mask.bool(), ids, -100)[1:]
            logits = twin(input_ids=ids[None, :-1]).logits[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            trained += int((labels != -100).sum())
        optimizer.param_groups[0]["lr"] = run.lrs[step]
        optimizer.zero_grad()
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(total.item() / trained)

    assert min(per_row) >= 1 and max(per_row) > 2 and losses[-1] < losses[0] - 0.5
    # fp32 with other summation orders; Adam's eps keeps gradients that are zero but for rounding from counting.
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=1e-6, atol=0)
