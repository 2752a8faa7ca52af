"""Adapters on a whole model: put them there, freeze the rest, name what trains."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn

from lora_converter.adapted import AdaptedModule, adapted_modules
from lora_converter.config import LoRAConfig
from lora_converter.dora import add_dora, check_takes_magnitude
from lora_converter.experts import ExpertClasses, add_expert_adapters, experts_of
from lora_converter.fake_quantized import tell_what_merging_means
from lora_converter.linear import add_adapter, linears_of
from lora_converter.new_tokens import add_token_rows, check_token_rows, grown_in_full
from lora_converter.offset import add_offset, check_init
from lora_converter.packed_module import count_elements
from lora_converter.swap import check_forward_is_called, uncalled_linears
from lora_converter.targets import ALL_LINEAR, look_up, matches, select_targets
from lora_converter.tensor_parallel import LoRAFactor
from lora_converter.trained import (
    mark_trained,
    modules_with_parameters,
    select_trained,
    trained_modules,
    trained_parameters,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a model's parameters, over its full (unsharded, unpacked) shapes; a shared one counts once."""

    trainable: int
    total: int
    adapted: int
    """Number of modules with an adapter."""

    kinds: dict[str, int] = field(default_factory=dict)
    """The same by kind: `{"linears": 224}`."""

    in_full: int = 0
    """Number of modules whose own parameters train."""


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    canonical_name: Callable[[str], str] = str,
    factor_class: type[LoRAFactor] = LoRAFactor,
    expert_classes: ExpertClasses = MappingProxyType({}),
    tokens: Sequence[int] = (),
    base_rows: int = 0,
) -> list[AdaptedModule]:
    """Puts an adapter on every linear and routed expert that `config` selects and freezes everything else, in place.

    Adapters of a model with real weights are initialised at once; those on the meta device when `reset_adapters` is
    called after the weights exist.

    Args:
        model: Any module with linears, `nn.Linear` or transformers' `Conv1D`. No name and no value of it changes.
        seed: With a linear's canonical name, decides the adapter's initial values.
        dtype: Dtype of the adapters, fp32 if left out, whatever the model's: at small rates most steps of AdamW are
            less than what bf16 can tell apart.
        canonical_name: A linear's name in this model -> its name on any host; the same if left out.
        factor_class: What A and B are made of; a host may need more of them.
        expert_classes: The host's classes of modules that hold routed experts.
        tokens: Ids whose rows of the embedding and of the head train, too; rows that are not there are added.
        base_rows: How many rows the base has, of a model with more; see `token_rows.py`.

    Returns:
        The adapted modules, in the model's order.

    Raises:
        ValueError: A pattern matches nothing, nothing is selected, a linear is named that is never called, experts are
            to have dropout or a magnitude, a linear has a product of its own and is to have a magnitude, `train_also`
            names what cannot train, or the model has adapters already. The model is then as it was.
    """
    if any(True for _ in adapted_modules(model)):
        raise ValueError(
            "The model has LoRA adapters already: load another adapter into them, or take them off with unload_adapter."
        )
    linears, experts = linears_of(model), experts_of(model, expert_classes)
    selected = select_targets(
        list(linears),
        targets=config.target_modules,
        exclude=config.exclude_modules,
        experts=[f"{fqn}.{weight}" for fqn, (_, kind) in experts.items() for weight in kind.expert_weights],
    )
    weights: dict[str, list[str]] = {}
    for fqn, _, weight in (name.rpartition(".") for name in selected if name not in linears):
        weights.setdefault(fqn, []).append(weight)
    targets = _called(model, [fqn for fqn in selected if fqn in linears], config)
    for fqn in targets:
        check_forward_is_called(fqn, linears[fqn])
        if config.use_dora:
            check_takes_magnitude(fqn, linears[fqn])
    for fqn in weights:
        check_forward_is_called(fqn, experts[fqn][0])
    add = add_dora if config.use_dora else add_offset if config.init else add_adapter
    configs = configs_of(config, targets, experts=list(weights))
    trained = _trained(model, config, adapted=[*targets, *weights], experts=list(experts))
    if config.init:
        check_init(config, {fqn: (linears[fqn], configs[fqn].rank) for fqn in targets}, experts=list(weights))
    like: Any = {"dtype": dtype, "factor_class": factor_class}
    check_token_rows(model, tokens, config, adapted=targets)
    for fqn in targets:
        add(linears[fqn], configs[fqn], fqn=fqn, canonical_name=canonical_name(fqn), **like)
    for fqn, own in weights.items():
        module, kind = experts[fqn]
        name = canonical_name(fqn)
        add_expert_adapters(module, kind, configs[fqn], weights=own, fqn=fqn, canonical_name=name, dtype=dtype)
    named: Any = {"canonical_name": canonical_name, "dtype": dtype}
    add_token_rows(model, tokens, config, base_rows=base_rows, trained=trained, **named)
    mark_trained(model, trained)
    freeze_base(model)
    adapted = list(adapted_modules(model))
    for each in adapted:
        if not next(iter(each.adapter_parameters().values())).is_meta:
            each.reset_adapter(seed)
            each.reset_from_base(seed)
    for grown in grown_in_full(model).values():
        if not grown.weight.is_meta:
            grown.set_initial_rows(grown.initial_rows(seed))
    tell_what_merging_means(adapted)
    return adapted


def _trained(model: nn.Module, config: LoRAConfig, *, adapted: list[str], experts: list[str]) -> list[str]:
    """The modules of `train_also`.

    Raises:
        ValueError: One has an adapter or shares a weight with one that has, holds routed experts, or is packed.
    """
    modules = modules_with_parameters(model)
    selected = select_trained(modules, config.train_also)
    adapter_of = {id(p): fqn for fqn in adapted for p in modules[fqn].parameters(recurse=False)}
    for fqn in selected:
        params = list(modules[fqn].parameters(recurse=False))
        wrong = {
            "holds routed experts, which train by adapters alone. Name them in lora.target_modules": fqn in experts,
            "is quantized or packed, and cannot train. Leave it out of lora.train_also": any(
                not p.is_floating_point() for p in params
            ),
        }
        for owner in dict.fromkeys(adapter_of[id(p)] for p in params if id(p) in adapter_of):
            shares = "has an adapter" if owner == fqn else f"shares its weight with {owner}, which has an adapter"
            wrong[f"{shares}. Add {owner} to lora.exclude_modules, or leave {fqn} out of lora.train_also"] = True
        for reason in (reason for reason, applies in wrong.items() if applies):
            raise ValueError(f"lora.train_also: {fqn} {reason}.")
    return selected


def _called(model: nn.Module, targets: list[str], config: LoRAConfig) -> list[str]:
    """The selected linears without those that are never called, which nobody may name.

    Raises:
        ValueError: One is named, or none is left.
    """
    uncalled = {fqn: reader for fqn, reader in uncalled_linears(model).items() if fqn in targets}
    named = [p for p in config.target_modules if p != ALL_LINEAR and any(matches(p, fqn) for fqn in uncalled)]
    left = [fqn for fqn in targets if fqn not in uncalled]
    shown = ", ".join(f"{fqn} ({reader})" for fqn, reader in uncalled.items())
    if named or (uncalled and not left):
        raise ValueError(
            f"lora.target_modules = {config.target_modules}: the weights of {shown} are read without calling the "
            "linear, so that an adapter would do nothing. Name other linears, or add them to exclude_modules."
        )
    if uncalled:
        logger.info(f"LoRA: left out, since their weights are read without calling them: {shown}.")
    return left


def configs_of(config: LoRAConfig, linears: Sequence[str], experts: Sequence[str] = ()) -> dict[str, LoRAConfig]:
    """Name of an adapted module -> its own settings: the rank and alpha that the patterns give it.

    Raises:
        ValueError: A pattern matches none of the names, or two disagree, or experts are to have dropout or a magnitude.
    """
    if experts and config.dropout:
        raise ValueError(
            f"lora.dropout = {config.dropout}: adapters on routed experts have none, nor have PEFT's. Set it to 0, or "
            "take experts out of lora.target_modules."
        )
    if experts and config.use_dora:
        raise ValueError(
            "lora.use_dora = true: adapters on routed experts have no magnitude, and PEFT takes none on parameters. "
            "Set it to false, or take experts out of lora.target_modules."
        )
    if config.expert_rank and not experts:
        logger.warning("LoRA: lora.expert_rank = %d has no effect: no experts are adapted.", config.expert_rank)
    own_rank = config.expert_rank or config.rank
    ranks = look_up(
        "lora.rank_pattern", config.rank_pattern, dict.fromkeys(linears, config.rank), dict.fromkeys(experts, own_rank)
    )
    alphas = look_up(
        "lora.alpha_pattern",
        config.alpha_pattern,
        dict.fromkeys(linears, config.alpha),
        dict.fromkeys(experts, config.alpha),
    )
    each = {
        pair: config.of_one(rank=pair[0], alpha=pair[1])
        for pair in {*zip(ranks.values(), alphas.values(), strict=True)}
    }
    return {fqn: each[ranks[fqn], alphas[fqn]] for fqn in ranks}


def freeze_base(model: nn.Module) -> None:
    """Sets `requires_grad` so that exactly the adapters train, and what `train_also` names: all else is frozen."""
    model.requires_grad_(False)
    for module in adapted_modules(model):
        for name, param in module.adapter_parameters().items():
            param.requires_grad_(name not in module.frozen_parameter_names)
    for param in trained_parameters(model).values():
        param.requires_grad_(True)


def reset_adapters(model: nn.Module, *, seed: int, from_base: bool = True) -> None:
    """Gives every adapter its initial values (see `AdaptedModule.reset_adapter`).

    Args:
        from_base: The base's weights are there, for initial values that depend on them.
    """
    for module in adapted_modules(model):
        module.reset_adapter(seed)
        if from_base:
            module.reset_from_base(seed)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts what trains and what there is."""
    params = list(model.parameters())
    kinds = Counter(module.adapter_kind for module in adapted_modules(model))
    return ParameterCount(
        trainable=sum(p.numel() for p in params if p.requires_grad),
        total=count_elements(model, params),
        adapted=kinds.total(),
        kinds=dict(kinds),
        in_full=len(trained_modules(model)),
    )
