"""The PEFT directory: adapters as Hugging Face PEFT, transformers and vLLM read them.

    adapter_config.json         r, lora_alpha, target_modules, ... (indent 2, sorted keys)
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r);
                                of stacked experts see `stacked.py`; of DoRA .lora_magnitude_vector (out)

A directory appears whole or not at all. PEFT's own loader drops keys that it does not know and leaves out those it
misses; here every key, shape and setting is checked on the way in and out, and what this package cannot do
(biases, pickled weights) is refused by name. Format: PEFT 0.21.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_converter.files import appears_complete, remove
from lora_converter.hf.changed_base import check_init, init_of
from lora_converter.hf.folder import read_header, write_tensors
from lora_converter.hf.magnitudes import check_magnitudes, magnitudes_in_file, take_magnitudes
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.peft_adapter import PeftAdapter, check_factors, config_of
from lora_converter.hf.peft_config import CONFIG_FILE, DEFAULT_ALPHA, DEFAULT_RANK, WEIGHTS_FILE, as_list, read_config
from lora_converter.hf.peft_patterns import match_pattern
from lora_converter.hf.saved_modules import is_saved
from lora_converter.hf.stacked import from_file, in_file, keys_in_file
from lora_converter.hf.trained_tokens import FIELD, take_token_rows, to_file
from lora_converter.names import without_wrappers
from lora_converter.tensors import is_finite

_FINGERPRINT = "lora_converter.base_fingerprint"

logger = logging.getLogger(__name__)

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
"""Scripts that save a model's state dict themselves leave the adapter's name in, `default`."""

_PREFIX = "base_model.model."

_CONVERT = (
    'If you trust it, convert it in its folder: python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True).items()}, "
    "'adapter_model.safetensors')\""
)

_BASE_WEIGHT = re.compile(
    r"base_model\.model\.(?P<module>(.+\.)?(lm_head|embed_tokens|embed_out|wte|word_embeddings))"
    r"(\.token_adapter)?(\.base_layer)?\.weight"
)
"""What PEFT stores beside the factors once an embedding or a head is a target, or the vocabulary was resized."""


def is_peft_directory(path: str | Path) -> bool:
    """Whether a folder looks like PEFT's, complete or not."""
    return any((Path(path) / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"))


def save_peft(
    adapter: PeftAdapter,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Writes a PEFT directory: beside its place first, moved there when it is complete.

    Args:
        dtype: Of all but DoRA's magnitudes: rounded to bf16 they would scale rows by more than training changes them.
        beside: Writes more files into the folder.
        replace: A PEFT directory at `folder` gives way to the new one; without it, and for anything else, it stays.

    Raises:
        FileExistsError: `folder` is there already and not empty.
        ValueError: The factors do not fit together, or are too large for `dtype`; nothing is written.
    """
    folder = Path(folder)
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (replace and is_peft_directory(folder)):
        raise FileExistsError(f"{folder} exists already. Remove it, or name another folder for the adapter.")
    check_factors(adapter, {m: adapter.rank_of(m) for m in adapter.factors}, str(folder))
    check_magnitudes(adapter, str(folder), use_dora=bool(adapter.magnitudes))
    tensors = _FileTensors(adapter, dtype)
    if broken := [name for name in tensors if not is_finite(tensors[name]) and is_finite(tensors.original(name))]:
        raise ValueError(f"{folder}: {', '.join(broken)} would hold inf in {dtype}. Name a wider dtype, bfloat16 say.")
    with appears_complete(folder) as draft:
        of_base = {_FINGERPRINT: adapter.base_fingerprint} if adapter.base_fingerprint else {}
        of_base |= adapter.packed.to_metadata() if adapter.packed else {}
        write_tensors(draft / WEIGHTS_FILE, tensors, {"format": "pt", **of_base})
        (draft / CONFIG_FILE).write_text(json.dumps(config_of(adapter), indent=2, sort_keys=True))
        if beside:
            beside(draft)


class _FileTensors(Mapping[str, torch.Tensor]):
    """The tensors of a weights file, each made when it is looked up: one at a time beside the adapter's own."""

    def __init__(self, adapter: PeftAdapter, dtype: torch.dtype):
        self._dtype, self._factors = dtype, adapter.factors
        saved = {k: w for k, w in adapter.base_weights.items() if is_saved(k, adapter.modules_to_save)}
        magnitudes = {f"{_PREFIX}{key}": own for key, own in magnitudes_in_file(adapter).items()}
        beside = {f"{_PREFIX}{key}": tensor for key, tensor in saved.items()}
        self._beside, self._exact = magnitudes | beside | to_file(adapter.token_rows), magnitudes.keys()
        keys = sorted(keys_in_file(adapter.factors).items())
        self._places = {f"base_model.model.{k}.lora_{letter}.weight": (m, letter) for k, m in keys for letter in "AB"}

    def original(self, name: str) -> torch.Tensor:
        """A tensor of the adapter's, in its own dtype."""
        if name in self._beside:
            return self._beside[name]
        module, letter = self._places[name]
        return self._factors[module]["AB".index(letter)]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._beside:
            own = self._beside[name].contiguous()
            return own if name in self._exact else own.to(self._dtype)
        return in_file(self.original(name), self._places[name][1]).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._places, *self._beside))

    def __len__(self) -> int:
        return len(self._places) + len(self._beside)


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
    tensors, metadata = _read_tensors(folder)
    saved = as_list(config.get("modules_to_save"))
    magnitudes = take_magnitudes(tensors, folder / WEIGHTS_FILE)
    token_rows = take_token_rows(tensors, config.get(FIELD), folder / WEIGHTS_FILE)
    pairs, base_weights = _sorted_out(tensors, folder / WEIGHTS_FILE, saved)
    rank, parameters = config.get("r", DEFAULT_RANK), as_list(config.get("target_parameters"))
    patterns, what = config.get("rank_pattern") or {}, f"{folder / CONFIG_FILE}: rank_pattern"
    factors = from_file(pairs, parameters, lambda name: match_pattern(patterns, name, rank, what), str(folder))
    ranks = {module: match_pattern(patterns, module, rank, what) for module in factors}
    alpha = float(config.get("lora_alpha", DEFAULT_ALPHA))
    table, what = config.get("alpha_pattern") or {}, f"{folder / CONFIG_FILE}: alpha_pattern"
    alphas = {module: float(match_pattern(table, module, alpha, what)) for module in factors}
    adapter = PeftAdapter(
        factors=factors,
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora", False)),
        target_modules=as_list(config.get("target_modules")),
        base_model=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
        base_fingerprint=metadata.get(_FINGERPRINT, ""),
        packed=PackedBase.from_metadata(metadata, str(folder / WEIGHTS_FILE)),
        alphas={module: own for module, own in alphas.items() if own != alpha},
        target_parameters=parameters,
        base_weights=base_weights,
        modules_to_save=saved,
        magnitudes=magnitudes,
        token_rows=token_rows,
        init=init_of(config),
        peft_version=config.get("peft_version") or "",
    )
    check_factors(adapter, ranks, str(folder))
    check_magnitudes(adapter, str(folder / CONFIG_FILE), use_dora=bool(config.get("use_dora")))
    check_init(adapter, str(folder / CONFIG_FILE))
    if broken := adapter.not_finite():
        logger.warning("%s: the factors of %s hold nan or inf.", folder, ", ".join(broken))
    return adapter


def _sorted_out(
    tensors: dict[str, torch.Tensor], path: Path, saved: list[str]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """Factors by module, and copies of base weights by key, of the tensors in a file."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    base_weights: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        plain = without_wrappers(key).removeprefix("module.")
        if match := _KEY.fullmatch(plain):
            pair = halves.setdefault(match["module"], {})
            if match["factor"] in pair:
                raise ValueError(f"{path}: lora_{match['factor']} of {match['module']} is there twice, as {key!r} too.")
            pair[match["factor"]] = tensor
        elif match := _BASE_WEIGHT.fullmatch(plain):
            base_weights[f"{match['module']}.weight"] = tensor
        elif plain.startswith(_PREFIX) and is_saved(plain.removeprefix(_PREFIX), saved):
            base_weights[plain.removeprefix(_PREFIX)] = tensor
        else:
            raise ValueError(
                f"{path}: {key!r} is no LoRA factor of a linear; only "
                "base_model.model.<module>.lora_A.weight and .lora_B.weight are read."
            )
    alone = [f"{module} has lora_{'/'.join(pair)} alone" for module, pair in halves.items() if len(pair) < 2]
    if alone or not halves:
        raise ValueError(f"{path}: {'; '.join(alone) or 'no adapter in it'}. The file is incomplete.")
    if lost := [module for module in saved if not any(is_saved(key, [module]) for key in base_weights)]:
        raise ValueError(f"{path}: nothing of modules_to_save = {lost} is in it. The file is incomplete.")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(halves.items())}, base_weights


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the weights file, and what its header says beside them."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickled = (
            f" adapter_model.bin is there, but pickled weights are not read: a pickle can run code. {_CONVERT}"
            * (folder / "adapter_model.bin").exists()
        )
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}.{pickled}")
    _, metadata = read_header(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({e}).") from None
