"""torchtitan's checkpoint section as what a `Job` says of it; the same options in both versions."""

from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP

from lora_converter.run.job import Base


def base_of(checkpoint: Any, hf_assets_path: str) -> Base | None:
    """Where the base comes from: `checkpoint.initial_load_path`, or the folder of Hugging Face's assets."""
    in_hf = checkpoint.initial_load_in_hf
    path = checkpoint.initial_load_path or (hf_assets_path if in_hf else None)
    if not path:
        return None
    return Base(path, "hf" if in_hf else "dcp", quantized=checkpoint.initial_load_in_hf_quantized)


def results_of(checkpoint: Any) -> dict[str, Any]:
    """What a job saves and exports, and what of it is not loaded, as arguments of `Job`."""
    return {
        "exports_peft": checkpoint.enable and checkpoint.last_save_in_hf,
        "export_dtype": TORCH_DTYPE_MAP[checkpoint.export_dtype],
        "not_loaded": tuple(name for name in checkpoint.exclude_from_loading if name),
        "saves": checkpoint.enable and not checkpoint.load_only,
    }
