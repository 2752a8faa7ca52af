"""What an adapter or a merged model holds, in words and numbers: the text of `lora-converter inspect`."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from lora_converter.hf.experts import fit_experts
from lora_converter.hf.folder import weight_shapes
from lora_converter.hf.peft_directory import PeftAdapter
from lora_converter.merge import read_merge_record
from lora_converter.tensors import is_finite

Weights = dict[str, tuple[Path, list[int], str]]


def describe_adapter(adapter: PeftAdapter, *, base: str | Path | None = None) -> str:
    """Settings, sizes, and one line per adapted linear, or stack of experts.

    Args:
        base: Hugging Face directory; with it each line says how large the update is beside the weight, and experts are
            shown as it stores them.

    Raises:
        ValueError: The base lacks a weight.
    """
    weights = weight_shapes(Path(base)) if base else {}
    if base:
        adapter = fit_experts(adapter, {key: shape for key, (_, shape, _) in weights.items()})
    parameters = sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    size = sum(a.nbytes + b.nbytes for a, b in adapter.factors.values())
    ranks = _span(adapter.rank_of(module) for module in adapter.factors)
    alphas = _span(adapter.alpha_of(module) for module in adapter.factors)
    scalings = _span(adapter.scaling_of(module) for module in adapter.factors)
    known = adapter.base_fingerprint
    lines = [
        f"rank {ranks}, alpha {alphas}, scaling {scalings}{' (rsLoRA)' if adapter.use_rslora else ''}, "
        f"dropout {adapter.dropout:g}",
        f"targets: {', '.join([*adapter.target_modules, *adapter.target_parameters])}",
        f"{adapter.matrices} linears, {parameters:,} parameters, {size:,} bytes",
        f"base: {adapter.base_model or 'not recorded'}{f', fingerprint {known}' if known else ''}",
        "",
    ]
    for module, factors in adapter.factors.items():
        weight = _read(weights, module if factors[0].ndim == 3 else f"{module}.weight") if base else None
        lines.append(f"{module}  {_update(adapter.delta_weight(module), weight)}{_flag(factors)}")
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
    weights, record = weight_shapes(folder), read_merge_record(folder)
    of_base = weight_shapes(Path(base)) if base else {}
    parameters, size, equal, lines = 0, 0, 0, []
    for key in weights:
        weight = _read(weights, key)
        parameters, size = parameters + weight.numel(), size + weight.nbytes
        flag = _flag([weight])
        if base and key in of_base and of_base[key][1] != weights[key][1]:
            raise ValueError(f"{key} is {tuple(weights[key][1])} in {folder} and {tuple(of_base[key][1])} in {base}.")
        update = weight.float() - _read(of_base, key).float() if base else None
        if update is not None and (flag or update.any()):
            lines.append(f"{key}  {_update(update, _read(of_base, key))}{flag}")
        elif flag:
            lines.append(f"{key}  {' x '.join(map(str, weight.shape))}{flag}")
        equal += update is not None and not update.any()
    settings = "rank {rank}, alpha {alpha:g}, scaling {scaling:g}\ntargets: {targets}\nadapter: {adapter}\nbase: {base}"
    head = [
        settings.format(**record) if record else "no record of a merge",
        f"{len(weights)} weights, {parameters:,} parameters, {size:,} bytes",
        *([f"{equal} weights equal the base's"] if base else []),
        "",
    ]
    return "\n".join([*head, *lines])


def _span(values: Iterable[float]) -> str:
    """One number, or the smallest and the largest of several."""
    several = sorted(set(values))
    return f"{several[0]:g}" if len(several) == 1 else f"{several[0]:g} to {several[-1]:g}"


def _update(update: torch.Tensor, weight: torch.Tensor | None) -> str:
    norm = update.norm()
    beside = "" if weight is None else f"  {100 * norm / weight.float().norm():.3g} % of |weight|"
    return f"{' x '.join(map(str, update.shape))}  |update| {norm:.3e}{beside}"


def _read(weights: Weights, key: str) -> torch.Tensor:
    if key not in weights:
        raise ValueError(f"The base has no {key}. Name the Hugging Face directory that the adapter was made for.")
    with safe_open(weights[key][0], framework="pt") as file:
        return file.get_tensor(key)


def _flag(tensors: Iterable[torch.Tensor]) -> str:
    tensors = [tensor.float() for tensor in tensors]  # float8 has no isfinite
    if not all(map(is_finite, tensors)):
        return "  NOT FINITE"
    return "" if all(tensor.any() for tensor in tensors) else "  ALL ZERO"
