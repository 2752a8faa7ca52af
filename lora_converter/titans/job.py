"""torchtitan's configs as a `Job`: what is said in the same way in both versions."""

import os
import re
from dataclasses import fields
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP

from lora_converter.run.job import Base, Job
from lora_converter.titans.chat_data import CHAT


def base_of(checkpoint: Any, hf_assets_path: str) -> Base | None:
    """Where the base comes from: `checkpoint.initial_load_path`, or the folder of Hugging Face's assets."""
    in_hf = checkpoint.initial_load_in_hf
    path = checkpoint.initial_load_path or (hf_assets_path if in_hf else None)
    if not path:
        return None
    return Base(path, "hf" if in_hf else "dcp", quantized=checkpoint.initial_load_in_hf_quantized)


def job_of(config: Any, *, dump_folder: str, assets: str, **own: Any) -> Job:
    """The job that a config describes.

    Args:
        config: torchtitan's, with `[lora]`.
        dump_folder: Where it writes.
        assets: The folder of Hugging Face's assets.
        own: What each host says in its own way, as arguments of `Job`.
    """
    checkpoint = config.checkpoint
    return Job(
        config=config.lora,
        seed=config.debug.seed or 0,
        steps=config.training.steps,
        folder=os.path.join(dump_folder, checkpoint.folder),
        base=base_of(checkpoint, assets),
        exports_peft=checkpoint.enable and checkpoint.last_save_in_hf,
        export_dtype=TORCH_DTYPE_MAP[checkpoint.export_dtype],
        not_loaded=tuple(name for name in checkpoint.exclude_from_loading if name),
        saves=checkpoint.enable and not checkpoint.load_only,
        **own,
    )


def as_written(value: Any) -> str:
    """A value as text, without the addresses of functions, which differ between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def data_of(loader: Any, training: Any, seed: int | None) -> dict[str, Any]:
    """What batches are made of, option -> value, where a loader is configured by itself, as on 0.3.

    A loader's own options are compared as they are written. Of conversations the rest is in the fingerprint of rows.
    """
    if getattr(loader, "dataset", "") == CHAT:
        return {"training.dataset": CHAT}
    options = {f"dataloader.{field.name}": getattr(loader, field.name) for field in fields(loader)}
    return {
        **{name: value if isinstance(value, (str, int)) else as_written(value) for name, value in options.items()},
        "dataloader": type(loader).__qualname__,
        "training.seq_len": training.seq_len,
        "training.local_batch_size": training.local_batch_size,
        "debug.seed": seed,
    }
