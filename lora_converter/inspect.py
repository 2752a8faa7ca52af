"""What an adapter holds, in words and numbers: the text of `lora-converter inspect`."""

from pathlib import Path

import torch
from safetensors import safe_open

from lora_converter.hf_folder import weight_shapes
from lora_converter.peft import PeftAdapter


def describe_adapter(adapter: PeftAdapter, *, base: str | Path | None = None) -> str:
    """Settings, sizes, and one line per adapted linear.

    Args:
        base: Hugging Face directory; with it each line says how large the update is beside the weight.

    Raises:
        ValueError: The base lacks a weight.
    """
    parameters = sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    size = sum(a.nbytes + b.nbytes for a, b in adapter.factors.values())
    scaling = f"alpha {adapter.alpha:g}, scaling {adapter.scaling:g}{' (rsLoRA)' if adapter.use_rslora else ''}"
    lines = [
        f"rank {adapter.rank}, {scaling}, dropout {adapter.dropout:g}",
        f"targets: {', '.join(adapter.target_modules)}",
        f"{len(adapter.factors)} linears, {parameters:,} parameters, {size:,} bytes",
        f"base: {adapter.base_model or 'not recorded'}",
        "",
    ]
    weights = weight_shapes(Path(base)) if base else {}
    for module, (a, b) in adapter.factors.items():
        update = adapter.delta_weight(module).norm()
        beside = f"  {100 * update / _norm(weights, module):.3g} % of |weight|" if base else ""
        lines.append(f"{module}  {b.shape[0]} x {a.shape[1]}  |update| {update:.3e}{beside}{_flag(a, b)}")
    return "\n".join(lines)


def _norm(weights: dict[str, tuple[Path, list[int]]], module: str) -> torch.Tensor:
    key = f"{module}.weight"
    if key not in weights:
        raise ValueError(f"The base has no {key}. Name the Hugging Face directory that the adapter was made for.")
    with safe_open(weights[key][0], framework="pt") as file:
        return file.get_tensor(key).float().norm()


def _flag(a: torch.Tensor, b: torch.Tensor) -> str:
    if not (a.isfinite().all() and b.isfinite().all()):
        return "  NOT FINITE"
    return "" if a.any() and b.any() else "  ALL ZERO"
