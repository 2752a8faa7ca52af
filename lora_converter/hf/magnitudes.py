"""DoRA's magnitudes in an adapter from a file or for one: whether they fit, and what they make of a weight's rows."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from lora_converter.dora import CHANGE, DoRALinear, norms_of
from lora_converter.hf.folder import open_model
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.names import without_wrappers

Tensor = torch.Tensor

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")

NO_VLLM = (
    "LoRA: the directory has use_dora = true, which PEFT and transformers load and vLLM refuses. For vLLM merge it: "
    "`lora-converter merge`, or lora.save_merged."
)


def magnitudes_in_file(adapter: PeftAdapter) -> dict[str, Tensor]:
    """Key, less PEFT's prefix -> magnitude, as a weights file has it."""
    return {f"{module}.lora_magnitude_vector": own for module, own in adapter.magnitudes.items()}


def take_magnitudes(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Module -> magnitude, of the tensors of a weights file, which they are taken out of.

    Raises:
        ValueError: A module has two, under keys of several forms.
    """
    found: dict[str, Tensor] = {}
    for key in [*tensors]:
        match = _KEY.fullmatch(without_wrappers(key).removeprefix("module."))
        if match and match["module"] in found:
            raise ValueError(f"{path}: lora_magnitude_vector of {match['module']} is there twice, as {key!r} too.")
        if match:
            found[match["module"]] = tensors.pop(key)
    return found


def check_magnitudes(adapter: PeftAdapter, what: str, *, use_dora: bool) -> None:
    """Refuses magnitudes that are not one for each row of each module.

    Args:
        what: What is read or written, for messages.
        use_dora: What its settings say.

    Raises:
        ValueError: Some do not fit; all are named.
    """
    there, wanted = adapter.magnitudes.keys(), adapter.factors.keys() if use_dora else set()
    if adapter.target_parameters and use_dora:
        raise ValueError(
            f"{what}: use_dora = true with target_parameters: PEFT has no magnitudes of parameters, so such "
            "an adapter can be neither read nor written."
        )
    if missing := sorted(wanted - there):
        raise ValueError(f"{what}: use_dora = true, and {', '.join(missing)} have no lora_magnitude_vector.")
    if unknown := sorted(there - wanted):
        raise ValueError(f"{what}: use_dora = {str(use_dora).lower()}, and {', '.join(unknown)} have a magnitude.")
    rows = {module: (b.shape[-2],) if b.ndim == 2 else () for module, (_, b) in adapter.factors.items()}
    if wrong := [m for m, own in adapter.magnitudes.items() if own.shape != rows[m] or not own.is_floating_point()]:
        shapes = ", ".join(f"{m} is {tuple(adapter.magnitudes[m].shape)}, must be {rows[m]}" for m in wrong)
        raise ValueError(f"{what}: lora_magnitude_vector of {shapes}.")


def check_no_magnitudes_of_parameters(use_dora: bool, as_parameters: Iterable[str]) -> None:
    """Refuses DoRA on linears that PEFT's format names by their weights: PEFT has no magnitudes of parameters.

    Raises:
        ValueError: There are such; all are named.
    """
    if use_dora and (names := list(as_parameters)):
        raise ValueError(
            f"lora.use_dora = true: {', '.join(names)} stand beside routed experts and go to PEFT by "
            "target_parameters, of which it takes no DoRA. Name them in lora.exclude_modules, or set use_dora = false."
        )


def with_norms_of(adapter: PeftAdapter, base: str, what: str) -> PeftAdapter:
    """An adapter whose magnitudes are what was added to the norms of the base's rows, with those.

    Args:
        base: Hugging Face folder.
        what: What holds the adapter, for messages.

    Raises:
        ValueError: There is no such folder, or it lacks a weight or has it quantized.
    """
    if not adapter.magnitudes:
        return adapter
    refused = f"{what} holds what was added to the norms of the base's rows (DoRA), and {base!r} "
    if not Path(base).is_dir():
        raise ValueError(f"{refused}is no folder. Name the Hugging Face folder of the base with --base.")
    weights, magnitudes = open_model(base).weights, {}
    for module, change in adapter.magnitudes.items():
        key = f"{module}.weight"
        entry = weights[key][1] if key in weights else None
        if entry is None or not entry.is_float or entry.shape[:1] != list(change.shape):
            raise ValueError(
                f"{refused}has no unquantized {key} of {len(change)} rows. Name the base of the run with --base."
            )
        with safe_open(weights[key][0], framework="pt") as file:
            magnitudes[module] = file.get_tensor(key).float().norm(dim=1) + change.float()
    return replace(adapter, magnitudes=magnitudes)


def magnitude_changes(modules: Iterable[DoRALinear], magnitudes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a parameter -> what is added to the norms of a module's rows for it to have its magnitudes, fp32.

    A collective where they are sharded.

    Args:
        magnitudes: FQN -> m, (out_features), of every module.
    """
    found: dict[str, Tensor] = {}
    for module in modules:
        norms = module.row_norms()
        found[f"{module.lora_fqn}.{CHANGE}"] = magnitudes[module.lora_fqn].to(norms.device, torch.float32) - norms
    return found


def row_scales(pieces: Iterator[Tensor], magnitude: Tensor, *, transposed: bool) -> Tensor:
    """m / ‖W + s B A‖ per output row, fp32: (out_features, 1), or (out_features) where that is the weight's last dim.

    Args:
        pieces: W + s B A, fp32, some of the weight's first dim at a time.
        transposed: The weight is (in_features, out_features).
    """
    squares = [piece.square().sum(0 if transposed else 1) for piece in pieces]
    total = torch.stack(squares).sum(0) if transposed else torch.cat(squares)
    scale = magnitude.float() / norms_of(total)
    return scale if transposed else scale.unsqueeze(1)
