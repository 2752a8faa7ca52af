"""The PEFT directory: adapters as Hugging Face PEFT, transformers and vLLM read them.

    adapter_config.json         r, lora_alpha, target_modules, ... (indent 2, sorted keys)
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)

A directory appears whole or not at all. PEFT's own loader drops keys that it does not know and leaves out those it
misses; here every key, shape and setting is checked on the way in and out, and what this package cannot do (DoRA,
modules_to_save, biases, pickled weights) is refused by name. Format: PEFT 0.21.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_converter.config import scaling
from lora_converter.files import appears_complete, remove
from lora_converter.hf.folder import FLOATS, read_header, write_tensors
from lora_converter.hf.peft_config import CONFIG_FILE, WEIGHTS_FILE, as_list, config_of, read_config

_FINGERPRINT = "lora_converter.base_fingerprint"

logger = logging.getLogger(__name__)

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in Hugging Face's names.

    Attributes:
        factors: Module -> (A, B), shapes (rank, in_features) and (out_features, rank).
        target_modules: As PEFT matches them: whole names, or last parts of names.
        base_model: Where the base is, for people and loaders; may be empty.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: list[str]
    base_model: str = ""
    fan_in_fan_out: bool = False
    """The weights of the base are (in_features, out_features): transformers' GPT-2."""
    base_fingerprint: str = ""
    """Of the base in the trainer's names (`fingerprint.py`), in the header of the weights; empty if not known."""

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return scaling(self.rank, self.alpha, self.use_rslora)

    def delta_weight(self, module: str) -> torch.Tensor:
        """The update of a module's weight, in the weight's own shape, fp32."""
        left, right = self.delta_factors(module)
        return self.scaling * (left @ right)

    def delta_factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices whose product, scaled, is `delta_weight`, fp32; rows of the first give its rows."""
        a, b = (factor.float() for factor in self.factors[module])
        return (a.t(), b.t()) if self.fan_in_fan_out else (b, a)


def is_peft_directory(path: str | Path) -> bool:
    """Whether a folder looks like PEFT's, complete or not."""
    return any((Path(path) / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"))


def save_peft(
    adapter: PeftAdapter, folder: str | Path, *, dtype: torch.dtype = torch.float32, replace: bool = False
) -> None:
    """Writes a PEFT directory: beside its place first, moved there when it is complete.

    Args:
        replace: A PEFT directory at `folder` gives way to the new one; without it, and for anything else, it stays.

    Raises:
        FileExistsError: `folder` is there already and not empty.
        ValueError: The factors do not fit the adapter's rank.
    """
    folder = Path(folder)
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (replace and is_peft_directory(folder)):
        raise FileExistsError(f"{folder} exists already. Remove it, or name another folder for the adapter.")
    _check_factors(adapter, str(folder))
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.to(dtype)
        for module, factors in sorted(adapter.factors.items())
        for letter, factor in zip("AB", factors, strict=True)
    }
    with appears_complete(folder) as draft:
        fingerprint = {_FINGERPRINT: adapter.base_fingerprint} if adapter.base_fingerprint else {}
        write_tensors(draft / WEIGHTS_FILE, tensors, {"format": "pt", **fingerprint})
        (draft / CONFIG_FILE).write_text(json.dumps(config_of(adapter), indent=2, sort_keys=True))


def update_peft(adapter: PeftAdapter, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Replaces the files of a PEFT directory in place, for an engine that loads it while it is being updated.

    Each file is replaced at once, so a reader sees an old one or a new one, never a part; between updates of one run
    only the weights differ. `save_peft` makes the directory, and exchanges whole ones.

    Raises:
        ValueError: The factors do not fit the adapter's rank, or `folder` is no PEFT directory.
    """
    folder = Path(folder)
    if not is_peft_directory(folder):
        raise ValueError(f"{folder} is no PEFT directory yet. Write the first with save_peft.")
    draft = folder.with_name(f"{folder.name}.update")
    remove(draft)
    try:
        save_peft(adapter, draft, dtype=dtype)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if (draft / name).read_bytes() != (folder / name).read_bytes():
                os.replace(draft / name, folder / name)
    finally:
        remove(draft)


def load_peft(folder: str | Path) -> PeftAdapter:
    """Reads and checks a PEFT directory.

    Raises:
        ValueError: What is missing, damaged or not supported, with its name.
    """
    folder = Path(folder)
    config = read_config(folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    tensors, metadata = _read_tensors(folder)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key!r} is no LoRA factor of a linear; only "
                "base_model.model.<module>.lora_A.weight and .lora_B.weight are read."
            )
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    halves = [f"{module} has lora_{'/'.join(pair)} alone" for module, pair in factors.items() if len(pair) < 2]
    if halves or not factors:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {'; '.join(halves) or 'no adapter in it'}. The file is incomplete.")
    adapter = PeftAdapter(
        factors={module: (pair["A"], pair["B"]) for module, pair in sorted(factors.items())},
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora", False)),
        target_modules=as_list(config.get("target_modules")),
        base_model=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
        base_fingerprint=metadata.get(_FINGERPRINT, ""),
    )
    _check_factors(adapter, str(folder))
    broken = [m for m, pair in adapter.factors.items() if not all(map(_is_finite, pair))]
    if broken:
        logger.warning("%s: the factors of %s hold nan or inf.", folder, ", ".join(broken))
    return adapter


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the weights file, and what its header says beside them."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickled = (
            " adapter_model.bin is there, but pickled weights are not read: a pickle can run code."
            * (folder / "adapter_model.bin").exists()
        )
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}.{pickled}")
    _, metadata = read_header(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({e}).") from None


def _check_factors(adapter: PeftAdapter, what: str) -> None:
    for module, (a, b) in adapter.factors.items():
        shapes = f"{module}: lora_A is {tuple(a.shape)}, lora_B is {tuple(b.shape)}"
        if a.ndim != 2 or b.ndim != 2 or not (a.shape[0] == b.shape[1] == adapter.rank):
            raise ValueError(f"{what}: {shapes}; with r = {adapter.rank} they must be (r, in) and (out, r).")
        if not {a.dtype, b.dtype} <= FLOATS.keys():
            raise ValueError(f"{what}: {module}: factors are {a.dtype} and {b.dtype}; they must be floating point.")


def _is_finite(factor: torch.Tensor) -> bool:
    """Without a mask of the factor's size."""
    return not factor.numel() or all(bool(extreme.isfinite()) for extreme in factor.aminmax())
