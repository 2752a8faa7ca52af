"""A folder against what the model needs of it: one verdict on all ranks, before anything is loaded."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lora_converter.files import digest
from lora_converter.titan.ranks import agreed, gather_all, together
from lora_converter.titan.safe_dcp import METADATA_FILE, read_metadata

BASE_OPTION, ADAPTER_OPTION = "checkpoint.initial_load_path", "lora.initial_adapter_path"

_HINTS = {
    BASE_OPTION: " For a Hugging Face folder set checkpoint.initial_load_in_hf = true.",
    ADAPTER_OPTION: " It has no adapter_config.json either, so it is no PEFT directory.",
}


def stored_in(path: str, option: str) -> Metadata:
    """What a DCP folder holds, on all ranks.

    Args:
        option: The setting that names the folder.

    Raises:
        ValueError: On all ranks, if one of them finds no complete DCP folder there.
    """

    def read() -> Metadata:
        try:
            return read_metadata(path)
        except ValueError as e:
            hint = _HINTS.get(option, "") if "has no .metadata" in str(e) else ""
            raise ValueError(f"{option}: {e}{hint}") from None

    stored, found = together(lambda: (read(), digest(Path(path, METADATA_FILE))))
    agreed(found, f"{option}: {path}/{METADATA_FILE} (SHA-256)")
    return stored


def check_fits(wanted: dict[str, Any], stored: Metadata, what: str) -> None:
    """Raises one ValueError, the same on all ranks, that names every key that is missing or has another shape."""
    missing, misshapen = [], []
    for name, tensor in wanted.items():
        entry = stored.state_dict_metadata.get(name)
        if entry is None:
            missing.append(name)
        elif isinstance(entry, TensorStorageMetadata):
            if entry.size != tensor.shape:
                misshapen.append(f"{name} is {tuple(entry.size)} there and {tuple(tensor.shape)} in the model")
        elif isinstance(tensor, torch.Tensor):
            misshapen.append(f"{name} is no tensor there and {tuple(tensor.shape)} in the model")
    missing, misshapen = union_over_ranks(missing), union_over_ranks(misshapen)
    if missing or misshapen:
        found = [f"{len(missing)} keys are missing: {', '.join(missing)}."] if missing else []
        found += [f"{len(misshapen)} keys have another shape: {', '.join(misshapen)}."] if misshapen else []
        raise ValueError(f"{what} does not fit the model. {' '.join(found)} Check model.flavor and the folder.")


def union_over_ranks(names: list[str]) -> list[str]:
    """Names found on any rank: pipeline stages see different keys, and all ranks must raise or none."""
    return list(dict.fromkeys(name for part in gather_all(names) for name in part))
