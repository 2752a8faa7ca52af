"""A Hugging Face base and a PEFT adapter -> the merged model as a Hugging Face directory, without building the model.

Plan, validate, apply: every key and shape of the adapter is looked up in the base's headers before a byte is written.
Then one shard of the base after the other is read, updated and written, W + s · B A in fp32 and rounded once to the
shard's own dtype, so that memory holds about one shard. Names are those of the files: any architecture that PEFT's
names fit will do. Configuration and tokenizer files are copied. The output appears when it is complete.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lora_converter.hf_folder import appears_complete, weight_shapes
from lora_converter.peft import PeftAdapter, load_peft

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def merge_directories(
    base: str | Path, adapter: str | Path, output: str | Path, *, dtype: torch.dtype | None = None
) -> int:
    """Writes base + adapter to `output`.

    Args:
        base: Hugging Face directory with safetensors weights, in one file or in shards.
        adapter: PEFT directory.
        output: Directory to make.
        dtype: Of all floating-point weights written; that of each weight of the base if left out.

    Returns:
        The number of merged linears.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: The base has no safetensors, or the adapter does not fit it; every misfit is named.
    """
    base, output = Path(base), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already. Remove it, or name another directory for the merged model.")
    peft = load_peft(adapter)
    shards = _plan(base, peft, adapter)
    with appears_complete(output) as draft:
        for shard in tqdm(shards, desc="merging", unit="shard"):
            _merge_shard(shard, draft / shard.name, peft, dtype)
        _copy_the_rest(base, draft, dtype)
    return len(peft.factors)


def _plan(base: Path, peft: PeftAdapter, adapter: str | Path) -> list[Path]:
    """The base's shards, once the adapter is known to fit them."""
    weights = weight_shapes(base)
    problems = []
    for module, (a, b) in peft.factors.items():
        key, here = f"{module}.weight", [b.shape[0], a.shape[1]]
        if key not in weights:
            problems.append(f"{key} is not in the base")
        elif weights[key][1] != here:
            problems.append(f"{key} is {tuple(weights[key][1])} in the base and {tuple(here)} in the adapter")
    if problems:
        raise ValueError(f"The adapter in {adapter} does not fit the base in {base}: {'; '.join(problems)}.")
    return sorted({path for path, _ in weights.values()})


def _merge_shard(source: Path, target: Path, peft: PeftAdapter, dtype: torch.dtype | None) -> None:
    tensors = {}
    with safe_open(source, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            weight, module = file.get_tensor(key), key.removesuffix(".weight")
            if module in peft.factors:
                weight = (weight.float() + peft.delta_weight(module)).to(dtype or weight.dtype)
            elif dtype is not None and weight.is_floating_point():
                weight = weight.to(dtype)
            tensors[key] = weight
        metadata = file.metadata()
    save_file(tensors, target, metadata=metadata)


def _copy_the_rest(base: Path, draft: Path, dtype: torch.dtype | None) -> None:
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, draft / path.name)
    config = draft / "config.json"
    if dtype is not None and config.exists():
        fields = json.loads(config.read_text())
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(fields, indent=2) + "\n")
