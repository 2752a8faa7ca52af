"""A DCP folder against what the model needs of it: one verdict on all ranks, before anything is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lora_converter.dcp.reader import METADATA_FILE, load, read_folder
from lora_converter.dcp.twins import Twins
from lora_converter.fit import Misfit
from lora_converter.ranks import agreed, together, union_over_ranks

_HINT = "Check model.flavor and the folder."
_WORDS = {"missing": "keys are missing", "misshapen": "keys have another shape", "codes": "keys are no weights"}


def stored_in(path: str, option: str, *, hint: str = "") -> Metadata:
    """What a DCP folder holds, on all ranks.

    Args:
        option: The setting that names the folder.
        hint: What to say where the folder is of another kind.

    Raises:
        ValueError: On all ranks, if one of them finds no complete DCP folder there, or another one.
    """

    def read() -> tuple[Metadata, str]:
        try:
            return read_folder(path)
        except ValueError as e:
            wrong_kind = f" {hint}" if hint and f"it has no {METADATA_FILE}" in str(e) else ""
            raise ValueError(f"{option}: {e}{wrong_kind}") from None

    stored, digest = together(read)
    agreed_metadata(path, option, digest)
    return stored


def agreed_metadata(path: str | Path, option: str, digest: str) -> None:
    """Refuses folders of one name that are not the same on all ranks."""
    agreed(digest, f"{option}: {path}/{METADATA_FILE} (SHA-256)")


def check_fits(wanted: Mapping[str, Any], stored: Metadata, what: str) -> None:
    """Raises one ValueError, the same on all ranks, that names every key that is missing or has another shape.

    So it names weights that are stored as codes, integers or float8, whose values are not what they stand for.
    """
    misfit = Misfit()
    for name, tensor in wanted.items():
        entry = stored.state_dict_metadata.get(name)
        if entry is None:
            misfit.missing.append(name)
        elif isinstance(entry, TensorStorageMetadata):
            misfit.compare(name, entry.size, tensor.shape)
            there, here = entry.properties.dtype, tensor.dtype
            if here.is_floating_point and not (there.is_floating_point and (there.itemsize > 1 or there == here)):
                misfit.codes.append(f"{name} is {_short(there)} there and {_short(here)} in the model")
        elif isinstance(tensor, torch.Tensor):
            misfit.misshapen.append(f"{name} is no tensor there and {tuple(tensor.shape)} in the model")
    on_all_ranks = Misfit(**{kind: union_over_ranks(names) for kind, names in vars(misfit).items()})
    on_all_ranks.raise_if_any(f"{what} does not fit the model.", words=_WORDS, hint=_HINT)


class DcpBase:
    """The weights of `base`, as the DCP folder at `path` has them: `check`, then `load`.

    Args:
        base: The model's frozen parameters and buffers, sharded or not, packed or not.
        option: The setting that names the folder.
    """

    def __init__(self, base: Twins, path: str, option: str):
        self._base, self._path, self._option = base, path, option

    def check(self) -> None:
        """Compares names and shapes with the folder's.

        Raises:
            ValueError: On all ranks, if some do not fit; all are named.
        """
        hint = "For a Hugging Face folder set checkpoint.initial_load_in_hf = true."
        self._stored = stored_in(self._path, self._option, hint=hint)
        check_fits(self._base.wanted(), self._stored, f"The base in {self._path}")

    def load(self) -> None:
        """Reads everything into the model."""

        def read() -> None:
            for part in self._base.parts():
                load(part, self._path, self._stored, no_dist=True)

        together(read)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
