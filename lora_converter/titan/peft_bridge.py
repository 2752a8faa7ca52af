"""The adapters of a torchtitan model as a PEFT directory and back, whatever the layout.

    torchtitan   layers.0.attention.wq.lora_a.weight (rank, in), .lora_b.weight (out, rank)
    PEFT         base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, .lora_B.weight

Names, row orders and splits are the StateDictAdapter's (`naming.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseStateDictAdapter

from lora_converter.apply import plain_fqn
from lora_converter.config import LoRAConfig
from lora_converter.files import digest
from lora_converter.hf_folder import FLOATS, weight_shapes
from lora_converter.linear import LoRAFactor
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, load_peft
from lora_converter.titan.job_config import LoRA
from lora_converter.titan.naming import hf_linears, hf_name, hf_names
from lora_converter.titan.ranks import agreed, together

_NUMBERED = re.compile(r"\.\d+\.")

LinearShapes = dict[str, tuple[int, int]]
"""FQN of a linear -> (out_features, in_features)."""


def to_peft(
    adapter: BaseStateDictAdapter,
    state_dict: dict[str, torch.Tensor],
    linears: LinearShapes,
    config: LoRAConfig,
    *,
    base_model: str = "",
    base_fingerprint: str = "",
) -> PeftAdapter:
    """Full adapter tensors in torchtitan's names -> an adapter in Hugging Face's.

    Args:
        state_dict: `<fqn>.lora_a.weight` and `<fqn>.lora_b.weight` of every adapted linear.
        linears: All linears of the model, adapted or not.

    Raises:
        ValueError: The host cannot express a weight in Hugging Face's terms.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for fqn in adapted_fqns(state_dict):
        out_features, in_features = linears[fqn]
        a, b = state_dict[f"{fqn}.lora_a.weight"], state_dict[f"{fqn}.lora_b.weight"]
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            factors[hf.name] = (
                a if hf.columns is None else a[:, hf.columns],
                b if hf.rows is None else b[hf.rows],
            )
    return PeftAdapter(
        factors=dict(sorted(factors.items())),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=_shortest_targets(set(factors), _hf_names(adapter, linears)),
        base_model=base_model,
        base_fingerprint=base_fingerprint,
    )


def check_exportable(adapter: BaseStateDictAdapter | None, linears: LinearShapes, adapted: Iterable[str]) -> None:
    """Finds out before the training what would otherwise fail after it.

    Raises:
        ValueError: An adapted linear has no name in Hugging Face's terms; all such are named.
    """
    if adapter is None:
        raise ValueError("checkpoint.last_save_in_hf: the model has no StateDictAdapter to name PEFT's modules by.")
    nameless = []
    for fqn in adapted:
        try:
            hf_names(adapter, fqn, out_features=linears[fqn][0], in_features=linears[fqn][1])
        except ValueError:
            nameless.append(fqn)
    if nameless:
        raise ValueError(
            f"checkpoint.last_save_in_hf: {type(adapter).__name__} has no Hugging Face name for {len(nameless)} "
            f"adapted linears: {', '.join(nameless)}. Name them in lora.exclude_modules, or leave last_save_in_hf at "
            "false."
        )


def check_mergeable(adapter: BaseStateDictAdapter, linears: LinearShapes, adapted: Iterable[str], base: str) -> None:
    """The same for merging: every adapted linear's weight is in the base's files, and not quantized.

    Raises:
        ValueError: Some are not; all are named.
    """
    weights = weight_shapes(Path(base))
    names = [
        f"{name}.weight"
        for fqn in adapted
        for name in hf_names(adapter, fqn, out_features=linears[fqn][0], in_features=linears[fqn][1])
    ]
    wrong = [name for name in names if name not in weights or weights[name][2] not in FLOATS.values()]
    if wrong:
        raise ValueError(
            f"lora.save_merged: {len(wrong)} adapted weights are not in {base}, or quantized there: "
            f"{', '.join(wrong)}. Name their linears in lora.exclude_modules, or leave save_merged at false."
        )


def from_peft(
    adapter: BaseStateDictAdapter, peft: PeftAdapter, linears: LinearShapes, *, adapted: Iterable[str], what: str
) -> dict[str, torch.Tensor]:
    """The inverse: full tensors in torchtitan's names for the linears `adapted`.

    Raises:
        ValueError: `what` lacks modules, has modules that are not adapted, or has another width; all are named.
    """
    state_dict: dict[str, torch.Tensor] = {}
    missing, misshapen, used = [], [], set()
    for fqn in adapted:
        out_features, in_features = linears[fqn]
        a, b = torch.empty(peft.rank, in_features), torch.empty(out_features, peft.rank)
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            used.add(hf.name)
            if hf.name not in peft.factors:
                missing.append(hf.name)
                continue
            hf_a, hf_b = peft.factors[hf.name]
            rows = out_features if hf.rows is None else len(hf.rows)
            if hf_a.shape[1] != in_features or hf_b.shape[0] != rows:
                there = f"({hf_b.shape[0]}, {hf_a.shape[1]})"
                misshapen.append(f"{hf.name} is {there} there and ({rows}, {in_features}) in the model")
                continue
            a[:, slice(None) if hf.columns is None else hf.columns] = hf_a.float()
            b[slice(None) if hf.rows is None else hf.rows] = hf_b.float()
        state_dict[f"{fqn}.lora_a.weight"], state_dict[f"{fqn}.lora_b.weight"] = a, b
    problems = [f"{len(missing)} adapted linears are missing in it: {', '.join(missing)}."] if missing else []
    problems += [f"{len(misshapen)} have another shape: {', '.join(misshapen)}."] if misshapen else []
    if extra := sorted(set(peft.factors) - used):
        problems.append(f"{len(extra)} of its modules have no adapter here: {', '.join(extra)}.")
    if problems:
        raise ValueError(f"{what} does not fit the model. {' '.join(problems)} Check lora.target_modules.")
    return state_dict


def load_peft_everywhere(path: str) -> PeftAdapter:
    """`load_peft` on every rank, of one and the same adapter.

    Raises:
        ValueError: On all ranks, if one cannot read its folder, or if they hold different adapters.
    """
    peft, found = together(lambda: (load_peft(path), digest(Path(path, CONFIG_FILE), Path(path, WEIGHTS_FILE))))
    agreed(found, f"lora.initial_adapter_path: {path} (SHA-256)")
    return peft


def settings_of_peft(settings: LoRA, peft: PeftAdapter, adapter: BaseStateDictAdapter, linears: LinearShapes) -> LoRA:
    """`[lora]` for a run that starts from a PEFT directory: what is left at its default comes from the directory.

    Rank, alpha, rsLoRA and targets; dropout stays the run's own affair.

    Raises:
        ValueError: A setting is not at its default and differs from the directory's.
    """
    default, what = LoRAConfig(), settings.initial_adapter_path
    found: dict[str, Any] = {"rank": peft.rank, "alpha": peft.alpha, "use_rslora": peft.use_rslora}
    for name, value in found.items():
        if getattr(settings, name) not in (getattr(default, name), value):
            raise ValueError(
                f"lora.{name} = {getattr(settings, name)!r}, but the adapter in {what} has {value!r}. "
                f"Leave lora.{name} out to take the adapter's."
            )
    if settings.target_modules == default.target_modules and not settings.exclude_modules:
        found["target_modules"] = [fqn for fqn, shape in linears.items() if _stands_in(peft, adapter, fqn, shape)]
        if not found["target_modules"]:
            raise ValueError(f"{what} adapts {', '.join(sorted(peft.factors))}; the model has none of them.")
    return replace(settings, **found)


def _stands_in(peft: PeftAdapter, adapter: BaseStateDictAdapter, fqn: str, shape: tuple[int, int]) -> bool:
    try:
        return hf_name(adapter, fqn, out_features=shape[0], in_features=shape[1]) in peft.factors
    except ValueError:
        return False


def gather_adapter(
    adapters: dict[str, Any], model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> tuple[dict[str, torch.Tensor], LinearShapes]:
    """The adapters of all pipeline stages as full CPU tensors on rank 0, and the shapes of all linears; else nothing.

    One rank per stage sends; the others only take part in unsharding, one tensor at a time.
    """
    meshes = parallel_dims.get_all_one_dimensional_meshes()
    sends = all(mesh.get_local_rank() == 0 for name, mesh in meshes.items() if name != "pp")
    mine: dict[str, torch.Tensor] = {}
    for name, value in adapters.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if sends:
            mine[name] = full.detach().cpu().clone()
    shapes = {fqn: shape for part in model_parts for fqn, shape in linear_shapes(part).items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((mine, shapes) if sends else ({}, {}), gathered if dist.get_rank() == 0 else None)
    parts = [part for part in gathered if part is not None]
    return (
        {name: value for tensors, _ in parts for name, value in tensors.items()},
        {fqn: shape for _, found in parts for fqn, shape in found.items()},
    )


def linear_shapes(model: nn.Module) -> LinearShapes:
    """All linears of a model but the adapters' own, without the names that AC and torch.compile put between."""
    return {
        plain_fqn(fqn): (module.out_features, module.in_features)
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, LoRAFactor)
    }


def adapted_fqns(names: Iterable[str]) -> list[str]:
    """The linears that adapter parameters of these names belong to."""
    return sorted({name.rsplit(".", 2)[0] for name in names})


def _hf_names(adapter: BaseStateDictAdapter, linears: LinearShapes) -> set[str]:
    """Of all linears that Hugging Face's model has."""
    names = set()
    for fqn, (out_features, in_features) in linears.items():
        try:
            names.add(hf_name(adapter, fqn, out_features=out_features, in_features=in_features))
        except ValueError:
            continue  # adapted ones were found before; the others need no name
    return names


def _shortest_targets(adapted: set[str], everything: set[str]) -> list[str]:
    """PEFT's `target_modules`: last parts of names where they mean exactly the adapted linears, else whole names.

    A decoder that is not at `model.layers` is one part of a larger model (`language_model.model.layers` of Llama 4),
    whose other parts, unknown here, may have linears of the same names: then whole names too.
    """
    if any(_NUMBERED.search(name) and not name.startswith("model.layers.") for name in everything):
        return sorted(adapted)
    targets: set[str] = set()
    for name in adapted:
        last = name.rpartition(".")[2]
        same = {other for other in everything if other.rpartition(".")[2] == last}
        targets |= {last} if same <= adapted else {name}
    return sorted(targets)
