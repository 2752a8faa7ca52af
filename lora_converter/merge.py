"""A Hugging Face base and a PEFT adapter -> the merged model as a Hugging Face directory, without building the model.

Plan, validate, apply: every key and shape of the adapter is looked up in the base's headers before a byte is written.
Then one shard of the base after the other is read, updated and written, W + s · B A in fp32 and rounded once to the
weight's own dtype, some rows at a time, so that memory holds the adapter and less than a shard. Names are those of the
files: any architecture that PEFT's names fit will do. Configuration and tokenizer files are copied. The output appears
when it is complete.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from lora_converter.files import appears_complete, read_json
from lora_converter.hf.folder import FLOATS, read_header, weight_shapes, write_header
from lora_converter.hf.peft_directory import PeftAdapter, load_peft

RECORD_FILE = "lora_merge.json"
"""Beside the merged weights, which do not tell what was merged into them."""

_RECORD = {"adapter": str, "base": str, "rank": int, "alpha": float, "scaling": float, "targets": str}
_ELEMENTS_AT_A_TIME = 2**24
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def merge_directories(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> int:
    """Writes base + adapter to `output`.

    Args:
        base: Hugging Face directory with safetensors weights, in one file or in shards.
        adapter: PEFT directory.
        output: Directory to make.
        dtype: Of all floating-point weights written; that of each weight of the base if left out.
        replace: What an earlier merge wrote at `output` gives way; without it, and for anything else, it stays.

    Returns:
        The number of merged linears.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: The base has no safetensors, or the adapter does not fit it; every misfit is named.
    """
    base, output = Path(base), Path(output)
    if output.exists() and not (replace and (output / RECORD_FILE).exists()):
        raise FileExistsError(f"{output} exists already. Remove it, or name another directory for the merged model.")
    peft = load_peft(adapter)
    shards = _plan(base, peft, adapter)
    with appears_complete(output) as draft:
        for shard in tqdm(shards, desc="merging", unit="shard"):
            _merge_shard(shard, draft / shard.name, peft, dtype)
        _copy_the_rest(base, draft, dtype)
        record = {
            "adapter": str(adapter),
            "base": str(base),
            "rank": peft.rank,
            "alpha": peft.alpha,
            "scaling": peft.scaling,
            "targets": ", ".join(sorted(peft.target_modules)),
        }
        (draft / RECORD_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return len(peft.factors)


def read_merge_record(folder: Path) -> dict[str, Any] | None:
    """What `merge_directories` noted of the adapter in the folder it wrote; None in any other folder.

    Raises:
        ValueError: The note is damaged.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = read_json(path)
        return {name: kind(record[name]) for name, kind in _RECORD.items()}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}). Remove it to inspect the weights without it.") from None


def _plan(base: Path, peft: PeftAdapter, adapter: str | Path) -> list[Path]:
    """The base's shards, once the adapter is known to fit them."""
    weights = weight_shapes(base)
    problems = []
    for module, (a, b) in peft.factors.items():
        key, here = f"{module}.weight", [b.shape[0], a.shape[1]]
        here = here[::-1] if peft.fan_in_fan_out else here
        if key not in weights:
            problems.append(f"{key} is not in the base")
        elif weights[key][1] != here:
            problems.append(f"{key} is {tuple(weights[key][1])} in the base and {tuple(here)} in the adapter")
        elif weights[key][2] not in FLOATS.values():
            problems.append(f"{key} is quantized ({weights[key][2]}); merge into an unquantized copy of the base")
    if problems:
        raise ValueError(f"The adapter in {adapter} does not fit the base in {base}: {'; '.join(problems)}.")
    return sorted({path for path, _, _ in weights.values()})


def _merge_shard(source: Path, target: Path, peft: PeftAdapter, dtype: torch.dtype | None) -> None:
    """Writes one shard in its own order, some rows at a time: memory holds those rows, not the shard."""
    entries, metadata = read_header(source)
    written = {name: entry.cast(dtype) if dtype and entry.is_float else entry for name, entry in entries.items()}
    with open(target, "wb") as file:
        write_header(file, written, metadata)
        for name in entries:
            for rows in _merged_rows(source, name, peft, dtype):
                file.write(rows.contiguous().view(torch.uint8).numpy().data)


def _merged_rows(source: Path, key: str, peft: PeftAdapter, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """A weight's rows with their update, W + s · B A, in fp32 and rounded once. Other tensors as they are."""
    with safe_open(source, framework="pt") as file:  # opened for each tensor: its pages in memory go with it
        weight = file.get_tensor(key)
    if not weight.numel():
        return
    dtype = dtype if dtype and weight.dtype in FLOATS else weight.dtype
    module = key.removesuffix(".weight")
    left, right = peft.delta_factors(module) if module in peft.factors else (None, None)
    matrix = weight.reshape(weight.shape[0] if weight.ndim else 1, -1)
    size = max(1, _ELEMENTS_AT_A_TIME // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        rows = matrix[start : start + size]
        if left is not None and right is not None:
            rows = rows.float() + peft.scaling * (left[start : start + size] @ right)
        yield rows.to(dtype)


def _copy_the_rest(base: Path, draft: Path, dtype: torch.dtype | None) -> None:
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):  # links too: Hugging Face's cache is made of them
            shutil.copyfile(path, draft / path.name)
    if dtype is None:
        return
    config, index = draft / "config.json", draft / "model.safetensors.index.json"
    if config.exists():
        fields = read_json(config)
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(fields, indent=2) + "\n")
    if index.exists():
        fields = read_json(index)
        shards = [read_header(path)[0] for path in draft.glob("*.safetensors")]
        fields.setdefault("metadata", {})["total_size"] = sum(e.nbytes for shard in shards for e in shard.values())
        index.write_text(json.dumps(fields, indent=2) + "\n")
