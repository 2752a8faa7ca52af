"""Damages 10,000 files: each is read or refused with our error, changes nothing in part and is not held twice over.

python fuzz.py FOLDER    # in a process of its own, whose memory is nobody else's; prints what happened as JSON
"""

import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from harness import TINY  # registers the flavor "tiny"
from memory import Resident
from mutation import mutate, write_mutated
from safetensors.torch import save_file

from lora_converter import LoRAConfig, adapter_state_dict, apply_lora
from lora_converter.merge import RECORD_FILE, merge_directories, read_merge_record
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, load_peft, save_peft
from lora_converter.run.description import Description
from lora_converter.run.peft_io import read_step_as_peft
from lora_converter.sync import AdapterReceiver, pack
from lora_converter.titan.models import model_on_meta

WIDE = 2**17
"""Features, so that a file of factors takes 2 MiB and what is done beside reading it is small."""

NOISE = 2**20
"""Bytes of Python's own arenas, which do not shrink."""

Read = Callable[[], object]


def an_adapter() -> PeftAdapter:
    factors = {"up": (torch.randn(4, 8), torch.randn(WIDE, 4)), "down": (torch.randn(4, 8), torch.randn(8, 4))}
    return PeftAdapter(factors, 4, 8.0, 0.0, False, ["up", "down"])


def peft_directory(folder: Path) -> tuple[list[Path], Read]:
    save_peft(an_adapter(), folder)
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE], lambda: load_peft(folder)


def merge_inputs(folder: Path) -> tuple[list[Path], Read]:
    base = folder / "base"
    base.mkdir(parents=True)
    save_file({"up.weight": torch.randn(WIDE, 8), "down.weight": torch.randn(8, 8)}, base / "model.safetensors")
    save_peft(an_adapter(), folder / "adapter")

    def merge() -> None:  # of few rows at a time: 64 MiB of them are no matter of the file's size
        with mock.patch("lora_converter.hf.merged_rows._ELEMENTS_AT_A_TIME", 2**14):
            merge_directories(base, folder / "adapter", folder / "merged", replace=True)

    return [base / "model.safetensors", folder / "adapter" / CONFIG_FILE, folder / "adapter" / WEIGHTS_FILE], merge


def merge_record(folder: Path) -> tuple[list[Path], Read]:
    merge_inputs(folder)[1]()
    return [folder / "merged" / RECORD_FILE], lambda: read_merge_record(folder / "merged")


def step_folder(folder: Path) -> tuple[list[Path], Read]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_a": (4, TINY["dim"]), "lora_b": (TINY["dim"], 4)}
    tensors = {
        f"layers.{layer}.attention.wq.{name}.weight": torch.randn(shape, generator=generator)
        for layer in range(TINY["n_layers"])
        for name, shape in shapes.items()
    }
    dcp.save({**tensors, "optimizer.moments": torch.randn(2**19)}, checkpoint_id=folder, no_dist=True)
    Description("llama3", "tiny", "", {"rank": 4, "alpha": 8.0}).write(folder)
    files = [folder / name for name in (".metadata", "__0_0.distcp", "lora.json")]
    return files, lambda: read_step_as_peft(folder, model_on_meta)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDE), nn.Linear(WIDE, 4))
    apply_lora(model, LoRAConfig(rank=4))
    return model


KINDS: dict[str, tuple[Callable[[Path], tuple[list[Path], Read]], int]] = {
    "PEFT directories": (peft_directory, 4000),
    "merges": (merge_inputs, 2000),
    "step folders": (step_folder, 1500),
    "merge records": (merge_record, 500),
}


def fuzz(make: Callable[[Path], tuple[list[Path], Read]], files: int, folder: Path) -> dict[str, float]:
    """Counts, and the peak of memory over the size of the files that are read together."""
    paths, read = make(folder)
    originals = {path: path.read_bytes() for path in paths}
    read()
    rng, outcomes, memory = random.Random(0), Counter[str](), Resident()
    for _ in range(files):
        path = rng.choice(paths)
        write_mutated(path, originals[path], rng)
        try:
            read()
            outcomes["read"] += 1
        except ValueError as error:
            assert str(path.parent) in str(error), error
            outcomes["refused"] += 1
        path.write_bytes(originals[path])
    return {**outcomes, "memory": (memory.peak() - NOISE) / sum(map(len, originals.values()))}


def fuzz_packages() -> dict[str, float]:
    """The same for 2,000 packages, into a model, which must stay as it was."""
    receiver = AdapterReceiver(a_model(), base="it")
    package = pack(a_model(), version=1, base="it")
    before = adapter_state_dict(receiver.model)
    rng, outcomes, memory = random.Random(0), Counter[str](), Resident()
    for _ in range(2000):
        data = mutate(package, rng)
        try:
            receiver.receive(data)
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert all(torch.equal(before[name], value) for name, value in adapter_state_dict(receiver.model).items())
    made_here = 2 * len(package)  # the damaged copy, as bytearray and bytes
    return {**outcomes, "memory": (memory.peak() - NOISE - made_here) / len(package)}


if __name__ == "__main__":
    logging.disable()
    folder = Path(sys.argv[1])
    found = {name: fuzz(make, files, folder / name.replace(" ", "-")) for name, (make, files) in KINDS.items()}
    print(json.dumps({**found, "packages": fuzz_packages()}))
