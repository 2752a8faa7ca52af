"""What an adapter holds, in words and numbers: the text of `lora-converter inspect`."""

from pathlib import Path

import torch
from safetensors import safe_open

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
    weights = _weight_files(Path(base)) if base else {}
    for module, (a, b) in adapter.factors.items():
        lines.append(f"{module}  {b.shape[0]} x {a.shape[1]}  |update| {_delta(adapter, module).norm():.3e}"
                     f"{_relative(adapter, module, weights) if base else ''}{_flag(a, b)}")  # fmt: skip
    return "\n".join(lines)


def _delta(adapter: PeftAdapter, module: str) -> torch.Tensor:
    a, b = adapter.factors[module]
    return adapter.scaling * (b.float() @ a.float())


def _relative(adapter: PeftAdapter, module: str, weights: dict[str, Path]) -> str:
    key = f"{module}.weight"
    if key not in weights:
        raise ValueError(f"The base has no {key}. Name the Hugging Face directory that the adapter was made for.")
    with safe_open(weights[key], framework="pt") as file:
        weight = file.get_tensor(key).float()
    return f"  {100 * _delta(adapter, module).norm() / weight.norm():.3g} % of |weight|"


def _flag(a: torch.Tensor, b: torch.Tensor) -> str:
    if not (a.isfinite().all() and b.isfinite().all()):
        return "  NOT FINITE"
    return "" if a.any() and b.any() else "  ALL ZERO"


def _weight_files(base: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{base} holds no .safetensors file. Name the Hugging Face directory of the base.")
    return files
