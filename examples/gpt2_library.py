"""The library on a model that nobody prepared for it: transformers' GPT-2, whose linears are `Conv1D`.

    python examples/gpt2_library.py [FOLDER]

A small GPT-2 with random weights learns to count in steps of 7. Adapters alone train, in a plain loop; then they are
disabled, saved as a PEFT directory, read back and merged. Needs transformers (`pip install lora-converter[peft]`), and
downloads nothing.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    apply_lora,
    count_parameters,
    disable_adapter,
    merge_and_unload,
)
from lora_converter.peft import from_model, into_model, load_peft, save_peft

VOCABULARY, LENGTH = 64, 24


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


def batch(seed: int) -> torch.Tensor:
    """(16, LENGTH) token ids: each row counts in steps of 7 from somewhere."""
    start = torch.randint(0, VOCABULARY, (16, 1), generator=torch.Generator().manual_seed(seed))
    return (start + 7 * torch.arange(LENGTH)) % VOCABULARY


def loss_of(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def main(folder: Path) -> None:
    model, config = make_model(), LoRAConfig(rank=16, alpha=32.0)
    apply_lora(model, config)
    count = count_parameters(model)
    print(f"{count.adapted} linears adapted, {count.trainable:,} of {count.total:,} parameters train")

    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    for step in range(1, 201):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        unseen = batch(0)
        trained = loss_of(model, unseen)
        with disable_adapter(model):  # the base, at no cost: a reference model for RL, say
            print(f"unseen rows: base {loss_of(model, unseen):.3f}, adapted {trained:.3f}")

        save_peft(from_model(model), folder / "adapter")
        again = make_model()
        apply_lora(again, config)
        into_model(load_peft(folder / "adapter"), again)
        print(f"read back: {loss_of(again, unseen):.3f}")

        merge_and_unload(again).save_pretrained(folder / "merged")
        merged = GPT2LMHeadModel.from_pretrained(folder / "merged").eval()
        print(f"merged, in transformers alone: {loss_of(merged, unseen):.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
