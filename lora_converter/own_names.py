"""`[lora]`'s patterns on a host that has other names than those they are said of.

A pattern means what it matches of canonical names, so that one file selects the same modules on every host; one that
matches none of them is said of the host's own. Where that is not what the pattern would mean there by itself, the
modules' own names take its place, and whoever comes after deals with one kind of names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeVar

import torch.nn as nn

from lora_converter.config import LoRAConfig
from lora_converter.experts import ExpertClasses, experts_of
from lora_converter.linear import linears_of
from lora_converter.targets import matches, reaches, reaches_weight, targets_weight
from lora_converter.trained import modules_with_parameters

_LISTS, _TABLES = ("target_modules", "exclude_modules", "train_also"), ("rank_pattern", "alpha_pattern")
"""Options that are patterns, or have them as keys."""

C = TypeVar("C", bound=LoRAConfig)

Means = Callable[[str, str], bool]
"""A pattern and a name -> whether the one means the other."""


def in_own_names(
    config: C,
    model: nn.Module,
    canonical_name: Callable[[str], str],
    expert_classes: ExpertClasses = MappingProxyType({}),
) -> C:
    """Settings whose patterns are said of a model's own names.

    Args:
        canonical_name: A module's or weight's name in this model -> its name on any host.

    Raises:
        ValueError: Two patterns of a table give one module different numbers.
    """
    experts = experts_of(model, expert_classes)
    weights = [f"{fqn}.{name}" for fqn, (_, kind) in experts.items() for name in kind.expert_weights]

    def known(names: Iterable[str], means: Means = matches) -> list[tuple[str, str, Means]]:
        return [(name, canonical_name(name), means) for name in names]

    linears, of_experts = known(linears_of(model)), known(experts, _means_experts)
    targets = _own(config.target_modules, [*linears, *known(weights, targets_weight)])
    excluded = _own(config.exclude_modules, [*linears, *known(weights, reaches_weight)])
    trained = _own(config.train_also, known(modules_with_parameters(model)))
    tables: dict[str, Any] = {
        option: _numbers(f"lora.{option}", table, _own(table, [*linears, *of_experts]))
        for option in _TABLES
        for table in (getattr(config, option),)
    }
    lists = dict(zip(_LISTS, (targets, excluded, trained), strict=True))
    named: dict[str, Any] = {
        option: list(dict.fromkeys(chain.from_iterable(own.values()))) for option, own in lists.items()
    }
    return replace(config, **named, **tables)


def in_canonical_names(lora: Mapping[str, Any], canonical_name: Callable[[str], str]) -> dict[str, Any]:
    """The same settings, as `in_own_names` has left them, said of canonical names: for steps, which any host reads.

    Args:
        lora: Option -> value.
    """
    lists = {name: list(map(canonical_name, lora[name])) for name in _LISTS}
    tables = {name: {canonical_name(p): v for p, v in lora[name].items()} for name in _TABLES}
    return {**lora, **lists, **tables}


def _own(patterns: Iterable[str], known: list[tuple[str, str, Means]]) -> dict[str, list[str]]:
    """Pattern -> what stands for it: itself, or own names.

    Args:
        known: Own name, canonical name, and what means such a name.
    """
    found = {}
    for pattern in patterns:
        meant = [name for name, canonical, means in known if means(pattern, canonical)]
        by_itself = [name for name, _, means in known if means(pattern, name)]
        found[pattern] = [pattern] if meant == by_itself else meant or by_itself
    return found


def _means_experts(pattern: str, fqn: str) -> bool:
    return reaches(pattern, fqn, is_experts=True)


def _numbers(option: str, numbers: Mapping[str, Any], patterns: Mapping[str, list[str]]) -> dict[str, Any]:
    found: dict[str, tuple[str, Any]] = {}
    for pattern, names in patterns.items():
        for name in names:
            other, before = found.setdefault(name, (pattern, numbers[pattern]))
            if before != numbers[pattern]:
                raise ValueError(
                    f"{option}: {other!r} gives {name} {before}, {pattern!r} gives it {numbers[pattern]}. Keep one."
                )
    return {name: number for name, (_, number) in found.items()}
