"""Finds out whether a Hugging Face folder is quantized already, how, and what of it can be kept packed as it is.

Read are bitsandbytes NF4 (with and without double quantization, as transformers' `save_pretrained` writes it), MXFP4 as
gpt-oss has it, and fp8 in blocks of 128 x 128 as DeepSeek-V3 has it. The names of the tensors say which it is, and what
is quantized; `config.json` may be lost. All else is refused by the name that `config.json` or the tensors give it: its
bytes would be taken for weights.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader

from lora_converter.hf.folder import open_model
from lora_converter.hf.naming import HFPart, StateDictAdapter, hf_parts
from lora_converter.hf.quantized_reader import QuantizedReader
from lora_converter.hf.quantized_schemes import SCHEMES
from lora_converter.hf.quantized_weights import Files, NF4Weight, QuantizedWeight
from lora_converter.ranks import from_first_rank

_UNREAD = {
    r".*\.quant_state\.bitsandbytes__fp4": "bitsandbytes fp4",
    r".*\.SCB": "bitsandbytes int8",
    r".*\.(qweight|qzeros)": "GPTQ or AWQ",
    r".*\.(weight_packed|weight_scale)": "compressed-tensors, FBGEMM or ModelOpt",
}
"""Names of tensors, and the schemes that have them."""

_CODES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
"""Dtypes of codes. Buffers may have them too, but no weights."""


@dataclass(frozen=True)
class QuantizedFolder:
    """What is quantized in a folder. Plain data: one rank can find it out, and send it to the others.

    Attributes:
        scheme: In words.
        weights: By their stored names, which are those that the host's StateDictAdapter uses.
        parts: Stored names of what else belongs to these.
    """

    scheme: str
    weights: dict[str, QuantizedWeight]
    parts: frozenset[str]

    @property
    def formats(self) -> dict[str, str]:
        """Stored name -> the packed format that holds the very bits, of the weights that have a packed form."""
        return {name: weight.form for name, weight in self.weights.items() if weight.fits}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> (..., out, in), of all that are quantized."""
        return {name: weight.shape for name, weight in self.weights.items()}

    def reader(self, host: StorageReader) -> StorageReader:
        """Shows weights dequantized under their own names, and packed under `name + PACKED`.

        Args:
            host: Reads the folder's other weights, and need not know of any scheme.
        """
        return QuantizedReader(host, self.weights, self.parts)


def quantization_of(path: str | Path) -> QuantizedFolder | None:
    """How a Hugging Face folder is quantized; None if none of its weights is.

    It reads headers, and of NF4 what is small and absmaxes, up to the first that is not in bf16.

    Raises:
        ValueError: In a way that is not read, or the folder is damaged.
    """
    model = open_model(path)
    config = model.config.get("quantization_config")
    config = config if isinstance(config, dict) else {}
    by_names = [scheme for pattern, scheme in _UNREAD.items() if any(re.fullmatch(pattern, n) for n in model.weights)]
    for unread in [*_unread(config), *by_names]:
        raise _refusal(path, unread)
    with Files() as files:
        schemes = [scheme(model, files) for scheme in SCHEMES.values()]
        found = {scheme.name: names for scheme, names in ((scheme, scheme.names()) for scheme in schemes) if names}
        if len(found) > 1:
            raise _refusal(path, " and ".join(found))
        known = {name for names in found.values() for name in names}
        for name, (_, entry) in model.weights.items():
            if entry.dtype in _CODES and name.endswith(("weight", "_blocks")) and name not in known:
                raise ValueError(
                    f"{path}: {name} holds codes ({entry.dtype}), and nothing there says what they stand for."
                )
        for scheme in schemes:
            if scheme.name in found:
                weights = {name: scheme.weight(name) for name in found[scheme.name]}
                parts = frozenset(part for name in weights for part in scheme.parts(name))
                return QuantizedFolder(scheme.name, _exact(weights, files), parts)
    return None


def quantization_everywhere(path: str | Path) -> QuantizedFolder | None:
    """The same on all ranks, of which one looks. A collective."""
    return from_first_rank(lambda: quantization_of(path))


def packed_parts(
    adapter: StateDictAdapter, name: str, shape: tuple[int, ...], formats: Mapping[str, str]
) -> list[HFPart]:
    """Where a weight of the host stands in a folder that has all of it packed alike, and can be read as it is.

    Args:
        name: Of the weight, which is (..., out, in).
        formats: Of what the folder has packed.

    Returns:
        Nothing, if the folder has not, or the host has another order of columns.
    """
    try:
        parts = hf_parts(adapter, name, shape)
    except ValueError:
        return []
    forms = {formats.get(part.name, "") for part in parts}
    own = [p.dims[-1] == len(p.shape) - 1 and p.indices[-1] is None and p.places[-1] is None for p in parts]
    return parts if len(forms) == 1 and "" not in forms and all(own) else []


def _unread(config: dict[str, Any]) -> list[str]:
    """The scheme of a config.json, if it is none that is read."""
    method = config.get("quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & config.keys() else None)
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        return ["bitsandbytes int8"]
    if method == "bitsandbytes" and config.get("bnb_4bit_quant_type") == "fp4":
        return ["bitsandbytes fp4"]
    if method == "fp8" and config.get("weight_block_size", [128, 128]) != [128, 128]:
        return [f"fp8 and weight_block_size {config['weight_block_size']}"]
    if config and str(method) not in SCHEMES:
        return [{"gptq": "GPTQ", "awq": "AWQ"}.get(str(method), f"quant_method {method!r}")]
    return []


def _refusal(path: str | Path, scheme: str) -> ValueError:
    read = ", ".join(scheme.name for scheme in SCHEMES.values())
    return ValueError(
        f"{path} is quantized with {scheme}, which is not read; what is read: {read}. Name an unquantized copy of the "
        'model: lora.base_format = "nf4" packs it while it is read.'
    )


def _exact(weights: dict[str, QuantizedWeight], files: Files) -> dict[str, QuantizedWeight]:
    """NF4 with absmaxes in bf16, if that holds all of them."""
    nf4 = {name: weight for name, weight in weights.items() if isinstance(weight, NF4Weight)}
    for weight in nf4.values():
        for absmaxes in weight.all_absmaxes(files) if weight.fits else ():
            if not torch.equal(absmaxes.bfloat16().float(), absmaxes):
                return weights
    return weights | {name: dataclasses.replace(weight, form="nf4") for name, weight in nf4.items()}
