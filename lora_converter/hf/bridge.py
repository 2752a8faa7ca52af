"""Adapters in a host's names as PEFT's and back.

    host   layers.0.attention.wq.lora_a.weight (rank, in), .lora_b.weight (out, rank)
    PEFT   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, .lora_B.weight

Names, row orders and splits are the StateDictAdapter's (`naming.py`); which parameters are PEFT's factors is the
adapted module's to say (`AdaptedModule.peft_factors`). Routed experts are in `expert_bridge.py`.
"""

import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import torch

from lora_converter.config import LoRAConfig
from lora_converter.fit import Misfit
from lora_converter.hf.changed_base import check_same_matrix
from lora_converter.hf.expert_bridge import HostExperts, briefly, host_experts, is_padding
from lora_converter.hf.expert_naming import ExpertShapes
from lora_converter.hf.expert_patterns import linears_like_experts
from lora_converter.hf.magnitudes import NO_VLLM, check_no_magnitudes_of_parameters
from lora_converter.hf.naming import StateDictAdapter, hf_linears, hf_names
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.peft_directory import PeftAdapter
from lora_converter.hf.saved_modules import modules_of_keys, to_hf_keys
from lora_converter.hf.trained_tokens import to_hf_modules
from lora_converter.token_rows import ROWS

logger = logging.getLogger(__name__)

NO_DROPOUT = (
    "LoRA: PEFT takes no dropout on linears that are named by their weights, as those beside routed experts are: the "
    "directory says 0 in place of %g, which lora.json keeps."
)

_SWAPPED = (
    "LoRA: the factors of %s go over rows for columns, as PEFT has them; vLLM 0.33 takes no adapters on them. PEFT "
    "does, and a merged model goes everywhere."
)

_NUMBERED = re.compile(r"\.\d+\.")

LinearShapes = dict[str, tuple[int, int]]
"""FQN of a linear -> (out_features, in_features)."""

PeftNames = Mapping[str, tuple[str, str]]
"""Adapted weight, `<fqn>.weight` or `<experts>.w1` -> the adapter parameters that are its lora_A and lora_B."""

_WORDS = {
    "missing": "adapted modules are missing in it",
    "misshapen": "have another shape",
    "unknown": "of its modules have no adapter here",
}


def to_peft(
    adapter: StateDictAdapter,
    state_dict: MutableMapping[str, torch.Tensor],
    names: PeftNames,
    linears: LinearShapes,
    config: LoRAConfig,
    *,
    experts: ExpertShapes = MappingProxyType({}),
    alphas: Mapping[str, float] | None = None,
    magnitudes: Mapping[str, torch.Tensor] = MappingProxyType({}),
    has_experts: bool = False,
    base_model: str = "",
    base_fingerprint: str = "",
    packed: PackedBase | None = None,
    tokens: Iterable[int] = (),
) -> PeftAdapter:
    """Full adapter tensors in the host's names -> an adapter in Hugging Face's.

    Args:
        state_dict: The adapters' parameters, and weights that trained in full. They are taken out of it, so that what
            is made of one takes its place.
        names: Of every adapted weight.
        linears: All linears of the model, adapted or not.
        config: The job's; each weight has a rank of its own.
        experts: The model's modules of routed experts, at least the adapted ones.
        alphas: Adapted weight -> alpha, where it is not the job's.
        magnitudes: Adapted weight -> DoRA's magnitudes, (out_features).
        has_experts: The model has routed experts, see `linears_like_experts`.
        packed: The weights of the base that are packed, see `packed_base`.
        tokens: Whose rows trained. `state_dict` has the rows, under the names of what is added to the base's.

    Raises:
        ValueError: The host cannot express a weight in Hugging Face's terms.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    own_alphas: dict[str, float] = {}
    own_magnitudes: dict[str, torch.Tensor] = {}
    of_experts: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for weight, (name_a, name_b) in sorted(names.items()):
        fqn, _, last = weight.rpartition(".")
        a, b = state_dict.pop(name_a), state_dict.pop(name_b)
        if fqn in experts:
            of_experts.setdefault(fqn, {})[last] = (a, b)
            continue
        out_features, in_features = linears[fqn]
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            factors[hf.name] = (
                a if hf.columns is None else a[:, hf.columns],
                b if hf.rows is None else b[hf.rows],
            )
            if weight in magnitudes:
                own_magnitudes[hf.name] = magnitudes[weight] if hf.rows is None else magnitudes[weight][hf.rows]
            own_alphas[hf.name] = (alphas or {}).get(weight, config.alpha)
    as_parameters = linears_like_experts(factors) if has_experts else []
    check_no_magnitudes_of_parameters(config.use_dora, as_parameters)
    if own_magnitudes:
        logger.warning(NO_VLLM)
    if as_parameters and config.dropout:
        logger.warning(NO_DROPOUT, config.dropout)
    targets = _shortest_targets(factors.keys() - set(as_parameters), names_of_linears(adapter, linears))
    parameters = [f"{module}.weight" for module in as_parameters]
    for module in host_experts(adapter, {fqn: experts[fqn] for fqn in of_experts}):
        of_module = of_experts.pop(module.fqn)
        alpha = (alphas or {}).get(f"{module.fqn}.{next(iter(of_module))}", config.alpha)
        found, own = module.to_peft(of_module, alpha=alpha, use_rslora=config.use_rslora)
        factors, own_alphas = factors | found, own_alphas | own
        targets += [part.name.rpartition(".")[2] for part in module.parts if part.expert is not None]
        parameters += [part.name for part in module.parts if part.expert is None and part.name in found]
        if swapped := [part.name for part in module.parts if part.is_swapped and part.name in found]:
            logger.warning(_SWAPPED, ", ".join(swapped))
    names_of_rows = [name for name in state_dict if name.endswith(f".{ROWS}")]
    rows = {f"{name.removesuffix(ROWS)}weight": state_dict.pop(name) for name in names_of_rows}
    saved = to_hf_keys(adapter, state_dict)
    return PeftAdapter(
        factors=dict(sorted(factors.items())),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted(set(targets)),
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        packed=packed,
        alphas={module: alpha for module, alpha in own_alphas.items() if alpha != config.alpha},
        target_parameters=parameters,
        base_weights=saved,
        modules_to_save=modules_of_keys(saved),
        magnitudes=own_magnitudes,
        token_rows=to_hf_modules(adapter, rows, tokens),
    )


def alphas_of(names: PeftNames, configs: Mapping[str, LoRAConfig]) -> dict[str, float]:
    """Adapted weight -> alpha, of adapted modules' own settings by FQN."""
    return {weight: configs[weight.rpartition(".")[0]].alpha for weight in names}


def from_peft(
    adapter: StateDictAdapter,
    peft: PeftAdapter,
    names: PeftNames,
    linears: LinearShapes,
    *,
    configs: Mapping[str, LoRAConfig],
    what: str,
    experts: Iterable[HostExperts] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inverse: full tensors in the host's names, and DoRA's magnitudes by linear.

    Args:
        names: Of every adapted weight of the model.
        configs: Adapted weight -> its adapter's settings.
        what: What is read, for messages.
        experts: The model's modules of routed experts; `peft` is fitted to them (`fitted_to`).

    Raises:
        ValueError: `what` lacks modules, has modules that are not adapted, or has another width; all are named.
    """
    state_dict: dict[str, torch.Tensor] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    misfit, used = Misfit(), set()
    for weight, (name_a, name_b) in sorted(names.items()):
        fqn = weight.removesuffix(".weight")
        if fqn not in linears:
            continue
        out_features, in_features = linears[fqn]
        rank, alpha = configs[weight].rank, configs[weight].alpha
        a, b, m = torch.empty(rank, in_features), torch.empty(out_features, rank), torch.empty(out_features)
        for hf in hf_linears(adapter, fqn, out_features=out_features, in_features=in_features):
            used.add(hf.name)
            check_same_matrix(hf, peft.init, out_features)
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
                if configs[weight].use_dora and hf.name in peft.magnitudes:
                    m[slice(None) if hf.rows is None else hf.rows] = peft.magnitudes[hf.name].float()
        state_dict[name_a], state_dict[name_b] = a, b
        if configs[weight].use_dora:
            magnitudes[fqn] = m
    adapted = {weight.rpartition(".")[0] for weight in names}
    for module in experts:
        if module.fqn not in adapted:
            continue
        own = {last: configs[f"{module.fqn}.{last}"] for last in module.shapes if f"{module.fqn}.{last}" in names}
        for last, pair in module.from_peft(peft, own, misfit).items():
            state_dict |= dict(zip(names[f"{module.fqn}.{last}"], pair, strict=True))
        used |= {part.name for part in module.parts}
    misfit.unknown += [name for name in peft.factors.keys() - used if not is_padding(peft, name)]
    misfit.missing, misfit.unknown = briefly(misfit.missing), briefly(sorted({*misfit.unknown}))
    misfit.raise_if_any(f"{what} does not fit the model.", words=_WORDS, hint="Check lora.target_modules.")
    return state_dict, magnitudes


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
