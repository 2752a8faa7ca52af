"""A Hugging Face base and a PEFT adapter -> the merged model as a Hugging Face directory, without building the model.

Plan, validate, apply: what every key and shape of the adapter means is settled against the base's headers before a byte
is written (`hf/merge_plan.py`). Then one shard of the base after the other is read, updated and written, W + s · B A in
fp32 and rounded once to the weight's own dtype, some rows at a time, so that memory holds the adapter and less than a
shard. What is not finite is not written. Configuration, tokenizer and code files are copied, subfolders too. The output
appears when it is complete.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_converter.files import appears_complete, read_json
from lora_converter.hf.base_as import tell_of_packed
from lora_converter.hf.folder import INDEX_FILE, Entry, ModelFolder, open_model, read_header, write_header
from lora_converter.hf.merge_keys import MergePlan
from lora_converter.hf.merge_plan import plan_merge
from lora_converter.hf.merged_rows import merged_rows
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.peft_directory import load_peft
from lora_converter.hf.tokenizer_files import copy_tokenizer

logger = logging.getLogger(__name__)

RECORD_FILE = "lora_merge.json"
"""Beside the merged weights, which do not tell what was merged into them."""

_RECORD = {"adapter": str, "base": str, "rank": int, "alpha": float, "scaling": float, "targets": str}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_INDEXES = (".safetensors.index.json", ".bin.index.json", ".h5.index.json", ".msgpack.index.json")
_NOT_COPIED = (".git", ".cache")


def merge_directories(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    base_as: str = "",
    replace: bool = False,
) -> int:
    """Writes base + adapter to `output`.

    Args:
        base: Hugging Face directory with safetensors weights, in one file or in shards.
        adapter: PEFT directory.
        output: Directory to make.
        dtype: Of all floating-point weights written; that of each weight of the base if left out.
        base_as: "nf4": the weights that the training had packed are what they were there, those without an adapter
            too: rounded to bf16, packed and unpacked. The base's own if left out.
        replace: What an earlier merge wrote at `output` gives way; without it, and for anything else, it stays.

    Returns:
        The number of merged linears; each product of an expert is one.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: The base is not complete, the adapter does not fit it, or a result is not finite; every misfit is
            named, and nothing is written.
    """
    base, output = Path(base), Path(output)
    if output.exists() and not (replace and (output / RECORD_FILE).exists()):
        raise FileExistsError(f"{output} exists already. Remove it, or name another directory for the merged model.")
    peft, model = load_peft(adapter), open_model(base)
    peft.check_finite(str(adapter))
    plan = plan_merge(model, peft, str(adapter), base_as=base_as)
    _warn_of_another_base(peft, base)
    tell_of_packed(peft.packed, base_as, len(plan.packed))
    with appears_complete(output) as draft:
        for shard in tqdm(model.shards, desc="merging", unit="shard"):
            _merge_shard(model, shard, draft / shard.name, plan, dtype)
        _copy_the_rest(base, draft)
        before = {key: model.weights[plan.added.get(key, key)][1].shape for key in plan.replaced}
        resized = any(list(value.shape) != before[key] for key, value in plan.replaced.items())
        if (peft.token_rows or resized) and not copy_tokenizer(adapter, draft):
            logger.warning("%s has no tokenizer, so the merged model has the base's, without new tokens.", adapter)
        _describe(model, draft, plan, dtype)
        record = {
            "adapter": str(adapter),
            "base": str(base),
            **({"base_as": base_as} if base_as else {}),
            "rank": peft.rank,
            "alpha": peft.alpha,
            "scaling": peft.scaling,
            "targets": ", ".join(sorted(peft.target_modules)),
        }
        (draft / RECORD_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return plan.peft.matrices


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
        return {name: kind(record[name]) for name, kind in _RECORD.items()} | {"base_as": record.get("base_as", "")}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}). Remove it to inspect the weights without it.") from None


def _warn_of_another_base(peft: PeftAdapter, base: Path) -> None:
    """The adapter's fingerprint is of its trainer's names and not comparable here; names of bases are."""
    names = [Path(name.rstrip("/")).name.lower() for name in (peft.base_model, str(base.resolve()))]
    if peft.base_model and names[0] != names[1]:
        logger.warning("The adapter was made for the base %r, and is merged into %s.", peft.base_model, base)


def _merge_shard(model: ModelFolder, source: Path, target: Path, plan: MergePlan, dtype: torch.dtype | None) -> None:
    """Writes one shard in its own order, some rows at a time: memory holds those rows, not the shard."""
    entries, metadata = read_header(source)
    # What the plan adds stands at the end of the shard that it starts from.
    origins = {name: name for name in entries if model.weights.get(name, (source,))[0] == source}
    origins |= {name: origin for name, origin in plan.added.items() if origin in origins}
    written = {}
    for name, origin in origins.items():
        entry = entries[origin]
        if name in plan.replaced:
            shape = list(plan.replaced[name].shape)
            entry = Entry(entry.dtype, shape, entry.nbytes // max(1, entry.shape[0]) * shape[0])
        written[name] = entry.cast(dtype) if dtype and entry.is_float else entry
    with open(target, "wb") as file:
        write_header(file, written, metadata)
        for name, origin in origins.items():
            for rows in merged_rows(source, name, origin, plan, dtype):
                file.write(rows.contiguous().view(torch.uint8).numpy().data)


def _copy_the_rest(base: Path, draft: Path) -> None:
    """Everything that loading the model may need, but for other weights, adapters and what belongs to tools."""
    left_out = []
    for folder, folders, files in os.walk(base):
        here = Path(folder)
        for name in [name for name in folders if name in _NOT_COPIED or (here / name).is_symlink()]:
            folders.remove(name)
            left_out.append(str((here / name).relative_to(base)) + "/")
        for name in files:
            path = here / name
            is_adapter = name.startswith(("adapter_config.", "adapter_model."))
            if name.endswith((*_WEIGHTS, *_INDEXES)) or is_adapter or not path.is_file():
                left_out += [str(path.relative_to(base))] if path not in set(draft.iterdir()) else []
                continue
            target = draft / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # of a link its file: Hugging Face's cache is made of them
    merged = {path.name for path in draft.glob("*.safetensors")} | {INDEX_FILE}
    if unused := sorted(name for name in left_out if name not in merged):
        logger.info("Not copied into the merged model: %s.", ", ".join(unused))


def _describe(model: ModelFolder, draft: Path, plan: MergePlan, dtype: torch.dtype | None) -> None:
    """config.json and the index, where the merged model differs from the base in what they say."""
    config, index = draft / "config.json", model.path / INDEX_FILE
    if model.config and (dtype or plan.untied or plan.vocab_size):
        fields = dict(model.config)
        if dtype is not None:
            fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
        for part in (fields, fields.get("text_config")):
            if isinstance(part, dict) and plan.untied and (part is fields or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
            if isinstance(part, dict) and plan.vocab_size and "vocab_size" in part:
                part["vocab_size"] = plan.vocab_size
        config.write_text(json.dumps(fields, indent=2) + "\n")
    if index.exists():
        fields = read_json(index)
        for key, origin in plan.added.items():
            fields["weight_map"][key] = model.weights[origin][0].name
        if dtype or plan.added or plan.replaced:
            headers = [read_header(draft / shard.name)[0] for shard in model.shards]
            total = sum(entry.nbytes for entries in headers for entry in entries.values())
            fields["metadata"] = {**(fields.get("metadata") or {}), "total_size": total}
            (draft / INDEX_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        else:
            shutil.copyfile(index, draft / INDEX_FILE)
