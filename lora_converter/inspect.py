"""What an adapter or a merged model holds, in words and numbers: the text of `lora-converter inspect`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from lora_converter.hf.base_as import BASES, AsPacked, check_base_as, weights_as
from lora_converter.hf.experts import fit_experts
from lora_converter.hf.folder import open_model
from lora_converter.hf.merge_plan import plan_merge
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.peft_directory import PeftAdapter
from lora_converter.hf.quantized_schemes import NF4_PARTS
from lora_converter.hf.saved_modules import is_saved
from lora_converter.inspect_experts import (
    beside_error,
    count_modules,
    describe_product,
    percent,
    sorted_out,
    span,
    update_norm,
)
from lora_converter.merge import read_merge_record
from lora_converter.tensors import is_finite

NO_RECORD = "no record of a merge"


def describe_adapter(adapter: PeftAdapter, *, base: str | Path | None = None, base_as: str = "") -> str:
    """Settings, sizes, one line per adapted linear, and one per layer and product of adapted experts.

    Args:
        base: Hugging Face directory; with it each line says how large the update is beside the weight, and experts are
            shown as it stores them. If the training had the weight packed, the line also says what that changed, and
            what the update is beside it.
        base_as: The format that it was packed in, of an adapter that does not record it.

    Raises:
        ValueError: The base lacks a weight, or was not packed in `base_as`, or is needed and not named.
    """
    weights = _Weights(Path(base)) if base else None
    if adapter.init and not base:
        raise ValueError(
            f"The factors belong to a base that PEFT changed (init_lora_weights = {adapter.init!r}). Name the base as "
            "it was with --base."
        )
    if weights and base:
        adapter = plan_merge(open_model(base), adapter, "the adapter").peft if adapter.init else adapter
        base_as = base_as or (adapter.packed.form if adapter.packed else "")
        if base_as in BASES:
            weights.pack(base_as, adapter.packed)
        adapter = fit_experts(adapter, weights.shapes)
    in_full = {key: w for key, w in adapter.base_weights.items() if is_saved(key, adapter.modules_to_save)}
    rows = {module: own.rows for module, own in adapter.token_rows.items()}
    tensors = [factor for pair in adapter.factors.values() for factor in pair]
    tensors += [*adapter.magnitudes.values(), *in_full.values(), *rows.values()]
    parameters, size = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    ranks = span(adapter.rank_of(module) for module in adapter.factors)
    alphas = span(adapter.alpha_of(module) for module in adapter.factors)
    scalings = span(adapter.scaling_of(module) for module in adapter.factors)
    known = adapter.base_fingerprint
    linears, products = sorted_out(adapter)
    lines = [
        f"rank {ranks}, alpha {alphas}, scaling {scalings}{' (rsLoRA)' if adapter.use_rslora else ''}, "
        f"{'DoRA, whose rows are scaled after the updates shown here, ' if adapter.magnitudes else ''}"
        f"dropout {adapter.dropout:g}",
        f"targets: {', '.join([*adapter.target_modules, *adapter.target_parameters])}",
        f"{count_modules(len(linears), products)}, {parameters:,} parameters, {size:,} bytes",
        f"base: {adapter.base_model or 'not recorded'}{f', fingerprint {known}' if known else ''}"
        f"{f', trained on {adapter.packed.form} weights' if adapter.packed else ''}",
        "",
    ]
    norm_of, error_of = (weights.norm, weights.packing_error) if weights else (None, None)
    for module, (a, b) in linears.items():
        shape = (a.shape[1], b.shape[0]) if adapter.fan_in_fan_out else (b.shape[0], a.shape[1])
        norm = update_norm(a, b, adapter.scaling_of(module))
        weight = norm_of(f"{module}.weight") if norm_of else None
        error = error_of(f"{module}.weight") if error_of else None
        lines.append(f"{module}  {_update(shape, norm, weight)}{beside_error(norm, error)}{_flag((a, b))}")
    lines += [
        describe_product(name, experts, weight_norm=norm_of, packing_error=error_of)
        for name, experts in products.items()
    ]
    lines += [f"{key}  {_shape(weight)}, trained in full{_flag([weight])}" for key, weight in in_full.items()]
    lines += [f"{module}  {_shape(own)}, rows of single tokens{_flag([own])}" for module, own in rows.items()]
    return "\n".join(lines)


def describe_model(folder: str | Path, *, base: str | Path | None = None) -> str:
    """Sizes and the record of the merge of a Hugging Face directory, and what stands out in its weights.

    Args:
        base: Hugging Face directory; with it one line per weight that differs from the base's. One shard of each is in
            memory at a time, tensor by tensor.

    Raises:
        ValueError: The folder or the base holds no safetensors, or the base lacks a weight.
    """
    folder = Path(folder)
    weights, record = _Weights(folder), read_merge_record(folder)
    of_base = _Weights(Path(base)) if base else None
    parameters, size, equal, lines = 0, 0, 0, []
    for key, shape in weights.shapes.items():
        weight = weights.read(key)
        parameters, size = parameters + weights.elements(key), size + weight.nbytes
        flag = _flag([weight])
        if of_base and of_base.shapes.get(key, shape) != shape:
            raise ValueError(f"{key} is {shape} in {folder} and {of_base.shapes[key]} in {base}.")
        update = weight.float() - of_base.read(key).float() if of_base else None
        if of_base and update is not None and (flag or update.any()):
            lines.append(f"{key}  {_update(update.shape, float(update.norm()), of_base.norm(key))}{flag}")
        elif flag:
            lines.append(f"{key}  {_shape(weight)}{flag}")
        equal += update is not None and not update.any()
    settings = "rank {rank}, alpha {alpha:g}, scaling {scaling:g}\ntargets: {targets}\nadapter: {adapter}\nbase: {base}"
    head = [
        settings.format(**record) + f" as {record['base_as']}" * bool(record["base_as"]) if record else NO_RECORD,
        f"{len(weights.shapes)} weights, {parameters:,} parameters, {size:,} bytes",
        *([f"{equal} weights equal the base's"] if base else []),
        "",
    ]
    return "\n".join([*head, *lines])


_ABSMAX = ".absmax"
_SCALES = {"_scales": "_blocks", "_scale_inv": "", **dict.fromkeys(NF4_PARTS, "")}
"""How scales are named -> how the weight beside them is: gpt-oss's, DeepSeek's and bitsandbytes'."""


class _Weights:
    """The weights of a model folder. The file that was read last stays open.

    Raises:
        ValueError: See `open_model`.
    """

    def __init__(self, folder: Path):
        self._model = open_model(folder)
        self._places, self._packed = self._model.weights, dict[str, AsPacked]()
        self.shapes = {key: tuple(entry.shape) for key, (_, entry) in self._places.items()}
        self._path = Path()
        self._file: safe_open | None = None

    def pack(self, form: str, packed: PackedBase | None) -> None:
        """From now on `packing_error` tells.

        Raises:
            ValueError: See `check_base_as` and `weights_as`.
        """
        check_base_as(self._model, form, packed)
        self._packed = weights_as(self._model, form, packed)

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """A weight, or one row of its first dim: one expert's of stacked ones.

        Raises:
            ValueError: It is not there.
        """
        if f"{key}_blocks" in self._places:
            raise self._is_quantized(key)
        if key not in self._places:
            raise ValueError(f"The base has no {key}. Name the Hugging Face directory that the adapter was made for.")
        if self._file is None or self._path != self._places[key][0]:
            self._path = self._places[key][0]
            self._file = safe_open(self._path, framework="pt")
        return self._file.get_tensor(key) if row is None else self._file.get_slice(key)[row : row + 1]

    def elements(self, key: str) -> int:
        """Of the weights that a tensor holds: two in a byte of 4-bit codes, and none in scales beside a weight."""
        if any(key.endswith(end) and key.removesuffix(end) + of in self._places for end, of in _SCALES.items()):
            return 0
        has_codes = key.endswith("_blocks") or key + _ABSMAX in self._places
        return 2 * self._places[key][1].nbytes if has_codes else math.prod(self.shapes[key])

    def norm(self, key: str, row: int | None = None) -> float:
        """Of what `read` gives.

        Raises:
            ValueError: Those are codes.
        """
        if any(f"{key}{end}" in self._places for end in _SCALES):
            raise self._is_quantized(key)
        return float(self.read(key, row).float().norm())

    def _is_quantized(self, key: str) -> ValueError:
        return ValueError(f"{key} is quantized in the base: an update cannot be shown beside it.")

    def packing_error(self, key: str, row: int | None = None) -> float | None:
        """The norm of what packing changes in what `read` gives; None if the weight is not packed."""
        if key not in self._packed:
            return None
        weight = self.read(key, row)
        return float((weight.float() - self._packed[key].unpacked(weight)).norm())


def _update(shape: Sequence[int], norm: float, weight: float | None) -> str:
    beside = "" if weight is None else f"  {percent(norm, weight):.3g} % of |weight|"
    return f"{' x '.join(map(str, shape))}  |update| {norm:.3e}{beside}"


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _flag(tensors: Iterable[torch.Tensor]) -> str:
    tensors = [tensor.float() for tensor in tensors]  # float8 has no isfinite
    if not all(map(is_finite, tensors)):
        return "  NOT FINITE"
    return "" if all(tensor.any() for tensor in tensors) else "  ALL ZERO"
