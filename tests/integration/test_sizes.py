"""What real sizes cost: an adapter of an 8B model, a base of 2 GB."""

import json
import subprocess
import sys
import time
from pathlib import Path

import harness  # noqa: F401  (before torchtitan)
import pytest
import torch
from safetensors import safe_open
from torchtitan.models.llama3 import Llama3StateDictAdapter, Transformer, llama3_args

from lora_converter import LoRAConfig, apply_lora
from lora_converter.hf.bridge import to_peft
from lora_converter.hf.folder import Entry, write_header
from lora_converter.linear import linear_shapes
from lora_converter.peft import PeftAdapter, load_peft, save_peft

LAYERS, OUT, IN = 32, 4096, 8192


def test_an_adapter_of_rank_64_on_all_linears_of_an_8b_model_is_exported_in_10_seconds(tmp_path: Path) -> None:
    with torch.device("meta"):
        linears = linear_shapes(Transformer(llama3_args["8B"]))
    linears.pop("output")
    state, names = {}, {}
    for fqn, (out_features, in_features) in linears.items():
        state[f"{fqn}.lora_a.weight"] = torch.randn(64, in_features)
        state[f"{fqn}.lora_b.weight"] = torch.randn(out_features, 64)
        names[f"{fqn}.weight"] = (f"{fqn}.lora_a.weight", f"{fqn}.lora_b.weight")
    start = time.process_time()
    peft = to_peft(Llama3StateDictAdapter(llama3_args["8B"], None), state, names, linears, LoRAConfig(rank=64))
    save_peft(peft, tmp_path / "adapter")
    assert time.process_time() - start < 10
    assert len(load_peft(tmp_path / "adapter").factors) == 224
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0.6e9


@pytest.mark.parametrize("by_name", [False, True])
def test_an_80_layer_model_is_adapted_on_meta_in_a_second(by_name: bool) -> None:
    """0.22 s for all-linear, 0.37 s where each linear is named and has a rank of its own."""
    with torch.device("meta"):
        model = Transformer(llama3_args["70B"])
    names = [fqn for fqn in linear_shapes(model) if fqn != "output"]
    config = LoRAConfig(target_modules=names, rank_pattern=dict.fromkeys(names, 4)) if by_name else LoRAConfig()
    start = time.process_time()
    assert len(apply_lora(model, config)) == 560
    assert time.process_time() - start < 1


MERGE = """
import sys, threading, time
from lora_converter.merge import merge_directories
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], resident())

torch.randn(64, 64) @ torch.randn(64, 64)  # threads and buffers of the matrix product
idle, peak, done = resident(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
merge_directories(*sys.argv[1:])
done.set()
thread.join()
print(peak[0] - idle)
"""


@pytest.mark.slow
def test_merging_a_base_of_2_gb_takes_less_than_a_shard_of_memory(tmp_path: Path) -> None:
    """Files without written bytes read as zeros, so the merged weights are the update."""
    weight = Entry("BF16", [OUT, IN], OUT * IN * 2)
    base, per_shard = tmp_path / "base", LAYERS // 4
    base.mkdir()
    factors, placed, size = {}, {}, 0
    for number in range(4):
        layers = range(number * per_shard, (number + 1) * per_shard)
        with open(base / f"model-{number}.safetensors", "wb") as file:
            entries = {f"model.layers.{layer}.mlp.down_proj.weight": weight for layer in layers}
            write_header(file, entries, {"format": "pt"})
            size = file.tell() + per_shard * weight.nbytes
            file.truncate(size)
        placed |= {key: f"model-{number}.safetensors" for key in entries}
        for layer in layers:
            factors[f"model.layers.{layer}.mlp.down_proj"] = (torch.randn(16, IN), torch.randn(OUT, 16))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    save_peft(PeftAdapter(factors, 16, 16.0, 0.0, False, ["down_proj"]), tmp_path / "adapter")
    command = [sys.executable, "-c", MERGE, *(str(tmp_path / name) for name in ("base", "adapter", "merged"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 0.9 * size  # 0.62 measured
    last = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    with safe_open(tmp_path / "merged" / "model-3.safetensors", framework="pt") as file:
        merged = file.get_tensor(f"{last}.weight")
    a, b = factors[last]
    # Rounded once: one unit in the last place, where the order of fp32's sums decides.
    torch.testing.assert_close(merged.float(), (b @ a).bfloat16().float(), rtol=2**-7, atol=1e-6)
