"""The schemes of quantized Hugging Face folders that are read: which tensors belong together, and of which sizes.

Whatever a folder says of itself is compared with the headers of its files, which safetensors compares with their sizes.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lora_converter.hf.folder import ModelFolder
from lora_converter.hf.quantized_weights import (
    Files,
    FP8Weight,
    MXFP4Weight,
    Nested,
    NF4Weight,
    QuantizedWeight,
    Stored,
)
from lora_converter.packed_formats import FORMATS

_NF4_STATE = ".quant_state.bitsandbytes__nf4"
NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _NF4_STATE)

_STATE_BYTES = 4096
"""Of a `quant_state`, which takes 80 to 200."""

_NF4_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""bitsandbytes' that are whole blocks of 64, each of which then has the absmax of them all."""


class Scheme(ABC):
    """Takes the quantized weights of a folder together."""

    name: str

    def __init__(self, model: ModelFolder, files: Files):
        self._model, self._files = model, files

    @abstractmethod
    def names(self) -> list[str]:
        """The stored names of weights, also of those of which only parts are there."""

    @abstractmethod
    def weight(self, name: str) -> QuantizedWeight:
        """One of them.

        Raises:
            ValueError: Something is missing, or of another size than it says; it is named.
        """

    @abstractmethod
    def parts(self, name: str) -> list[str]:
        """Stored names of what else belongs to a weight."""

    def _names(self) -> dict[str, str]:
        """Stored name -> dtype."""
        return {name: entry.dtype for name, (_, entry) in self._model.weights.items()}

    def _stored(self, name: str) -> Stored:
        if name not in self._model.weights:
            raise ValueError(f"{self._model.path} is not complete: {name} is missing.")
        return Stored(name, *self._model.weights[name])

    def _part(self, of: str, name: str, dtypes: Sequence[str], shape: Sequence[int]) -> Stored:
        """What belongs to a weight, of the dtype and shape that it has then."""
        stored = self._stored(name)
        if stored.entry.dtype not in dtypes or stored.entry.shape != list(shape):
            found = f"{stored.entry.dtype} {stored.entry.shape}"
            raise self._damaged(name, f"it is {found}, which for {of} is {' or '.join(dtypes)} {list(shape)}")
        return stored

    def _damaged(self, name: str, why: str) -> ValueError:
        return ValueError(f"{self._model.path} is damaged: {name}: {why}.")


class BitsandbytesNF4(Scheme):
    name = "bitsandbytes NF4"

    def names(self) -> list[str]:
        ends = [(name, end) for name in self._names() for end in NF4_PARTS if name.endswith(end)]
        return list(dict.fromkeys(name.removesuffix(end) for name, end in ends))

    def parts(self, name: str) -> list[str]:
        return [name + end for end in NF4_PARTS]

    def weight(self, name: str) -> QuantizedWeight:
        codes, state = self._stored(name), self._state(name + _NF4_STATE)
        shape, block = tuple(state["shape"]), state["blocksize"]
        count = math.prod(shape)
        rows, nbytes = codes.entry.shape[:1], codes.entry.nbytes
        if codes.entry.shape != [*rows, 1] or nbytes != -(-count // 2) or nbytes % rows[0]:
            raise self._damaged(name, f"it is {codes.entry.dtype} {codes.entry.shape}, and holds no weight of {shape}")
        quant_map = self._part(name, name + ".quant_map", ["F32"], [16])
        values = FORMATS["nf4"].table(torch.device("cpu"))
        if not torch.allclose(self._files.read(quant_map), values, rtol=0, atol=1e-6):
            raise self._damaged(quant_map.name, "it is not NF4's")
        blocks = -(-count // block)
        nested = self._nested(name, state, blocks)
        absmax = self._part(name, name + ".absmax", ["U8" if nested else "F32"], [blocks])
        return NF4Weight(name, shape, "nf4-fp32", codes, absmax, block, nested)

    def _nested(self, name: str, state: dict[str, Any], blocks: int) -> Nested | None:
        if "nested_blocksize" not in state and name + ".nested_absmax" not in self._model.weights:
            return None
        block, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(block) is not int or block < 1 or type(offset) is not float or not math.isfinite(offset):
            raise self._damaged(name + _NF4_STATE, "it does not say what its nested absmaxes are")
        if state.get("nested_dtype") != "float32":
            raise self._damaged(name + _NF4_STATE, "its absmaxes are not of fp32")
        absmax = self._part(name, name + ".nested_absmax", ["F32"], [-(-blocks // block)])
        return Nested(absmax, self._part(name, name + ".nested_quant_map", ["F32"], [256]), block, offset)

    def _state(self, name: str) -> dict[str, Any]:
        stored = self._stored(name)
        if stored.entry.dtype != "U8" or len(stored.entry.shape) != 1 or stored.entry.nbytes > _STATE_BYTES:
            raise self._damaged(name, f"it is no JSON of at most {_STATE_BYTES} bytes")
        try:
            state = json.loads(self._files.read(stored).numpy().tobytes())
        except (ValueError, RecursionError):
            raise self._damaged(name, "it is no JSON") from None
        shape = state.get("shape") if isinstance(state, dict) else None
        if not isinstance(shape, list) or len(shape) < 2 or any(type(n) is not int or n < 1 for n in shape):
            raise self._damaged(name, "it names no shape of a weight")
        if state.get("quant_type") != "nf4" or state.get("blocksize") not in _NF4_BLOCKS:
            raise ValueError(
                f"{self._model.path}: {name} is {state.get('quant_type')} in blocks of {state.get('blocksize')}; "
                f"NF4 is read in blocks of {', '.join(map(str, _NF4_BLOCKS))}."
            )
        return state


class MXFP4Blocks(Scheme):
    name = "MXFP4"

    def names(self) -> list[str]:
        bytes_ = [name for name, dtype in self._names().items() if dtype == "U8"]
        bases = [
            name.removesuffix("_blocks").removesuffix("_scales")
            for name in bytes_
            if name.endswith(("_blocks", "_scales"))
        ]
        return [base + "_blocks" for base in dict.fromkeys(bases)]

    def parts(self, name: str) -> list[str]:
        return [name.removesuffix("_blocks") + "_scales"]

    def weight(self, name: str) -> QuantizedWeight:
        codes = self._stored(name)
        shape = codes.entry.shape
        if codes.entry.dtype != "U8" or len(shape) < 3 or shape[-1] != 16:
            raise self._damaged(name, f"it is {codes.entry.dtype} {shape}, and no blocks of 16 bytes")
        scales = self._part(name, self.parts(name)[0], ["U8"], shape[:-1])
        return MXFP4Weight(name, (*shape[:-2], shape[-2] * 32), "mxfp4", codes, scales)


class FP8Blocks(Scheme):
    name = "fp8 in blocks of 128 x 128"

    def names(self) -> list[str]:
        found = [name.removesuffix("_scale_inv") for name in self._names() if name.endswith("_scale_inv")]
        found += [name for name, dtype in self._names().items() if dtype == "F8_E4M3"]
        return list(dict.fromkeys(found))

    def parts(self, name: str) -> list[str]:
        return [name + "_scale_inv"]

    def weight(self, name: str) -> QuantizedWeight:
        codes = self._stored(name)
        if codes.entry.dtype != "F8_E4M3" or len(codes.entry.shape) < 2:
            raise self._damaged(name, f"it is {codes.entry.dtype} {codes.entry.shape}, and no matrix in F8_E4M3")
        *lead, rows, columns = codes.entry.shape
        scales = self._part(name, self.parts(name)[0], ["F32", "BF16"], [*lead, -(-rows // 128), -(-columns // 128)])
        return FP8Weight(name, (*lead, rows, columns), "fp8", codes, scales)


SCHEMES: dict[str, type[Scheme]] = {"bitsandbytes": BitsandbytesNF4, "mxfp4": MXFP4Blocks, "fp8": FP8Blocks}
"""`quant_method` of config.json -> scheme."""
