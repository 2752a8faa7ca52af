"""Rows of new tokens move between layouts: steps go on under another, and PEFT directories are written and read."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import build
from launch import main
from parity import FSDP2, NEW_TOKENS, PP2, TP2, row, whole_adapter
from reshard import HALF, resume, save
from safetensors.torch import load_file
from tiny_models import base_options

from lora_converter.peft import load_peft

LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}
FROM_TO = [("PP2", "TP2"), ("FSDP2", "PP2"), ("TP2", "FSDP2")]
EXPORTED_FROM = {2: list(LAYOUTS), 8: ["PP2 x TP2 x FSDP2"]}
ROWS = {layout: row(2, options, job=NEW_TOKENS) for layout, options in LAYOUTS.items()}
ROWS["PP2 x TP2 x FSDP2"] = row(8, PP2, TP2, FSDP2, job=NEW_TOKENS)
MODULES = {"tok_embeddings": "model.embed_tokens", "output": "lm_head"}


def export(layout: str, folder: Path, bases: Path) -> None:
    """One trained step as a PEFT directory: the base's rows and what was learned; read again, it is what it was."""
    step = f"--lora.initial_adapter_path={bases}/tokens/FSDP2/checkpoint/step-{HALF}"
    options = [*base_options("llama3", bases), *NEW_TOKENS, *ROWS[layout].layout]
    run = build(folder / "run", *options, step)
    run.trainer.checkpointer.load()
    run.trainer.checkpointer.run.write_peft(str(folder / "peft"))
    dist.barrier()  # only rank 0 writes, and nobody waits for it
    expected, peft = whole_adapter(run), load_peft(folder / "peft")
    base = load_file(bases / "llama3" / "model.safetensors")
    for ours, theirs in MODULES.items():
        ids, rows = peft.token_rows[theirs].ids, expected[f"{ours}.lora_token_rows"]
        assert len(ids) == 66 and ids[-1] == 321
        known = torch.tensor([index for index in ids if index < 320])
        whole = rows.clone()
        whole[: len(known)] += base[f"{theirs}.weight"][known]
        assert torch.equal(peft.token_rows[theirs].rows, whole)
    run.trainer.close()
    run = build(folder / "next", *options, f"--lora.initial_adapter_path={folder}/peft", "--lora.rank=16")
    run.trainer.checkpointer.load()
    for name, value in whole_adapter(run).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6 if name.endswith("token_rows") else 0)
    run.trainer.close()


def checks(bases: Path, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in LAYOUTS if ranks == 2 else ():
        found[f"save on {layout}"] = lambda _, r=ROWS[layout], at=bases / "tokens" / layout: save(r, at, bases)
    for saved, layout in FROM_TO if ranks == 2 else ():
        found[f"{saved} to {layout}"] = lambda _, r=ROWS[layout], at=bases / "tokens" / saved: resume(r, at, bases)
    for layout in EXPORTED_FROM[ranks]:
        found[f"export on {layout}"] = lambda folder, layout=layout: export(layout, folder, bases)
    return found


if __name__ == "__main__":
    main(checks(Path(sys.argv[1]).parent, int(os.environ["WORLD_SIZE"])))
