"""Adapters in a host's names as PEFT's and back.

    host   layers.0.attention.wq.lora_a.weight (rank, in), .lora_b.weight (out, rank)
    PEFT   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, .lora_B.weight

Names, row orders and splits are the StateDictAdapter's (`naming.py`); which parameters are PEFT's factors is the
adapted module's to say (`AdaptedModule.peft_factors`).
"""

import logging
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import torch

from lora_converter.config import LoRAConfig
from lora_converter.fit import Misfit
from lora_converter.hf.folder import open_model
from lora_converter.hf.merge_plan import can_be_merged
from lora_converter.hf.naming import StateDictAdapter, hf_linears, hf_names
from lora_converter.hf.peft_directory import PeftAdapter

_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

logger = logging.getLogger(__name__)

NO_DROPOUT = (
    "LoRA: PEFT takes no dropout on linears that are named by their weights, as those beside routed experts are: the "
    "directory says 0 in place of %g, which lora.json keeps."
)

_NUMBERED = re.compile(r"\.\d+\.")

LinearShapes = dict[str, tuple[int, int]]
"""FQN of a linear -> (out_features, in_features)."""

PeftNames = Mapping[str, tuple[str, str]]
"""Adapted weight, `<fqn>.weight` -> the adapter parameters that are its lora_A and lora_B."""

_WORDS = {
    "missing": "adapted linears are missing in it",
    "misshapen": "have another shape",
    "unknown": "of its modules have no adapter here",
}


def to_peft(
    adapter: StateDictAdapter,
    state_dict: Mapping[str, torch.Tensor],
    names: PeftNames,
    linears: LinearShapes,
    config: LoRAConfig,
    *,
    alphas: Mapping[str, float] | None = None,
    has_experts: bool = False,
    base_model: str = "",
    base_fingerprint: str = "",
) -> PeftAdapter:
    """Full adapter tensors in the host's names -> an adapter in Hugging Face's.

    Args:
        state_dict: The adapters' parameters.
        names: Of every adapted weight.
        linears: All linears of the model, adapted or not.
        config: The job's; each weight has a rank of its own.
        alphas: Adapted weight -> alpha, where it is not the job's.
        has_experts: The model has routed experts, see `linears_like_experts`.

    Raises:
        ValueError: The host cannot express a weight in Hugging Face's terms.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    own_alphas: dict[str, float] = {}
    for weight, (name_a, name_b) in sorted(names.items()):
        fqn = weight.removesuffix(".weight")
        out_features, in_features = linears[fqn]
        a, b = state_dict[name_a], state_dict[name_b]
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            factors[hf.name] = (
                a if hf.columns is None else a[:, hf.columns],
                b if hf.rows is None else b[hf.rows],
            )
            own_alphas[hf.name] = (alphas or {}).get(weight, config.alpha)
    as_parameters = linears_like_experts(factors) if has_experts else []
    if as_parameters and config.dropout:
        logger.warning(NO_DROPOUT, config.dropout)
    return PeftAdapter(
        factors=dict(sorted(factors.items())),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=_shortest_targets(factors.keys() - set(as_parameters), names_of_linears(adapter, linears)),
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        alphas={module: alpha for module, alpha in own_alphas.items() if alpha != config.alpha},
        target_parameters=[f"{module}.weight" for module in as_parameters],
    )


def alphas_of(names: PeftNames, configs: Mapping[str, LoRAConfig]) -> dict[str, float]:
    """Adapted weight -> alpha, of adapted modules' own settings by FQN."""
    return {weight: configs[weight.rpartition(".")[0]].alpha for weight in names}


def linears_like_experts(modules: Iterable[str]) -> list[str]:
    """Linears that PEFT takes for routed experts where the model has some, and so are to be named by their weights.

    With transformers 5, which fuses experts, PEFT 0.21 turns the names that experts' products used to have, as target
    modules, into the fused parameters: dense layers and shared experts beside them then get no adapter, without a word.
    """
    return [module for module in modules if module.rpartition(".")[2] in _NAMES_OF_EXPERTS]


def check_exportable(adapter: StateDictAdapter | None, linears: LinearShapes, adapted: Iterable[str]) -> None:
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


def check_mergeable(adapter: StateDictAdapter, linears: LinearShapes, adapted: Iterable[str], base: str) -> None:
    """The same for merging: every adapted linear's weight is in the base's files, and not quantized.

    Raises:
        ValueError: Some are not; all are named.
    """
    folder = open_model(base)
    names = [
        name
        for fqn in adapted
        for name in hf_names(adapter, fqn, out_features=linears[fqn][0], in_features=linears[fqn][1])
    ]
    wrong = [f"{name}.weight" for name in names if not can_be_merged(folder, name)]
    if wrong:
        raise ValueError(
            f"lora.save_merged: {len(wrong)} adapted weights are not in {base}, or quantized there: "
            f"{', '.join(wrong)}. Name their linears in lora.exclude_modules, or leave save_merged at false."
        )


def from_peft(
    adapter: StateDictAdapter,
    peft: PeftAdapter,
    names: PeftNames,
    linears: LinearShapes,
    *,
    configs: Mapping[str, LoRAConfig],
    what: str,
) -> dict[str, torch.Tensor]:
    """The inverse: full tensors in the host's names.

    Args:
        names: Of every adapted weight of the model.
        configs: Adapted weight -> its adapter's settings.
        what: What is read, for messages.

    Raises:
        ValueError: `what` lacks modules, has modules that are not adapted, or has another width; all are named.
    """
    state_dict: dict[str, torch.Tensor] = {}
    misfit, used = Misfit(), set()
    for weight, (name_a, name_b) in sorted(names.items()):
        fqn = weight.removesuffix(".weight")
        out_features, in_features = linears[fqn]
        rank, alpha = configs[weight].rank, configs[weight].alpha
        a, b = torch.empty(rank, in_features), torch.empty(out_features, rank)
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            used.add(hf.name)
            if hf.name not in peft.factors:
                misfit.missing.append(hf.name)
                continue
            hf_a, hf_b = peft.factors[hf.name]
            rows = out_features if hf.rows is None else len(hf.rows)
            there, here = (hf_b.shape[0], hf_a.shape[1]), (rows, in_features)
            misfit.compare(hf.name, there, here)
            misfit.compare_number(f"the rank of {hf.name}", hf_a.shape[0], rank)
            misfit.compare_number(f"the alpha of {hf.name}", peft.alpha_of(hf.name), alpha)
            if there == here and hf_a.shape[0] == rank:
                a[:, slice(None) if hf.columns is None else hf.columns] = hf_a.float()
                b[slice(None) if hf.rows is None else hf.rows] = hf_b.float()
        state_dict[name_a], state_dict[name_b] = a, b
    misfit.unknown = sorted(set(peft.factors) - used)
    misfit.raise_if_any(f"{what} does not fit the model.", words=_WORDS, hint="Check lora.target_modules.")
    return state_dict


def names_of_linears(adapter: StateDictAdapter, linears: LinearShapes) -> list[str]:
    """Hugging Face's names of all linears that it has."""
    names = []
    for fqn, (out_features, in_features) in linears.items():
        try:
            names += hf_names(adapter, fqn, out_features=out_features, in_features=in_features)
        except ValueError:
            continue  # adapted ones were found before; the others need no name
    return names


def _shortest_targets(adapted: AbstractSet[str], everything: Iterable[str]) -> list[str]:
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
