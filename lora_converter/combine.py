"""Several PEFT adapters as one, whose update is the weighted sum of theirs: the work of `lora-converter combine`.

The sum is exact, with the ranks added up, or the best one of a rank that is asked for (`hf/weighted_sum.py`). The
adapters must be of one base and know a module by one name; what tells otherwise is refused, by name. With the base's
folder at hand experts are brought into one form first, and copies of the base's weights are told from changed ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.expert_layouts import goes_over_second
from lora_converter.hf.expert_patterns import SPELLINGS, split_expert
from lora_converter.hf.folder import open_model
from lora_converter.hf.merge_plan import plan_merge
from lora_converter.hf.peft_adapter import PeftAdapter, base_weights_in_training
from lora_converter.hf.peft_directory import load_peft, save_peft
from lora_converter.hf.weighted_sum import Deviation, weighted_sum

_OTHER_BASE = "Name adapters of one base, or set --accept-other-base if both names mean the same."


@dataclass(frozen=True)
class Term:
    """One adapter of a sum: its PEFT directory and its weight, any finite number."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Combined:
    """What `combine` has written.

    Attributes:
        deviations: Module -> how far its update is from the sum.
    """

    adapter: PeftAdapter
    dtype: torch.dtype
    deviations: dict[str, Deviation]


def parse_term(text: str) -> Term:
    """`my_adapter` or `my_adapter:0.7`. A path may hold colons where it can be meant in one way only.

    Raises:
        ValueError: The weight is no finite number, or two folders may be meant.
    """
    path, colon, number = text.rpartition(":")
    is_folder = Path(text).is_dir()
    try:
        weight = float(number) if colon and path else math.nan
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        if is_folder or not colon:
            return Term(Path(text))
        raise ValueError(f"{text}: no such folder, and {number!r} is no finite number. Write my_adapter:0.7.")
    if is_folder and Path(path).is_dir():
        raise ValueError(f"{text} and {path} are both folders. Write {text}:1 or {path}/:{number}.")
    return Term(Path(text)) if is_folder else Term(Path(path), weight)


def subtracted(terms: Sequence[Term]) -> list[Term]:
    """The first term, and the others with the opposite weights.

    Raises:
        ValueError: There is one alone.
    """
    if len(terms) < 2:
        raise ValueError("--subtract: there is one adapter alone, and nothing to subtract from it.")
    return [terms[0], *(Term(term.folder, -term.weight) for term in terms[1:])]


def combine(
    terms: Sequence[Term],
    output: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    accept_other_base: bool = False,
) -> Combined:
    """Writes a PEFT directory whose update of each module is the sum of the adapters' updates, times their weights.

    Args:
        output: Directory to make.
        rank: At most so much per module, by the best approximation; the sum of the ranks if left out.
        dtype: Of the factors; the widest of the adapters' if left out.
        base: Hugging Face directory of the base; needed where the adapters alone do not tell enough.
        accept_other_base: Adapters whose files name different bases are added all the same.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: An adapter is not supported, or they do not fit together; nothing is written.
    """
    if not terms:
        raise ValueError("There is no adapter to combine.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank}: must be at least 1.")
    names = [str(term.folder) for term in terms]
    adapters = [load_peft(term.folder) for term in terms]
    for name, adapter in zip(names, adapters, strict=True):
        adapter.check_finite(name)
        if adapter.magnitudes:
            raise ValueError(f"{name} is a DoRA adapter (use_dora = true): no DoRA adapter is the sum of others.")
    fingerprint = _common_base(adapters, names, accept_other=accept_other_base)
    adapters = [_settled(adapter, name, base) for name, adapter in zip(names, adapters, strict=True)]
    adapters = _under_common_names(adapters, names)
    _check_experts(adapters, names)
    dtype = dtype or _widest(adapters)
    result, deviations = weighted_sum(adapters, [term.weight for term in terms], rank=rank, dtype=dtype)
    base_model = next((adapter.base_model for adapter in adapters if adapter.base_model), "")
    result = replace(result, base_model=base_model, base_fingerprint=fingerprint)
    save_peft(result, output, dtype=dtype)
    return Combined(result, dtype, deviations)


def _common_base(adapters: Sequence[PeftAdapter], names: Sequence[str], *, accept_other: bool) -> str:
    """The fingerprint of the adapters' base; empty if none is known, or several are.

    Raises:
        ValueError: Fingerprints differ, or where not all are known the last parts of the bases' names.
    """
    fingerprints = {name: a.base_fingerprint for name, a in zip(names, adapters, strict=True) if a.base_fingerprint}
    bases = {name: Path(a.base_model.rstrip("/")).name for name, a in zip(names, adapters, strict=True) if a.base_model}
    different = fingerprints if len({*fingerprints.values()}) > 1 else {}
    if len(fingerprints) < len(adapters) and len({base.lower() for base in bases.values()}) > 1:
        different = different or bases
    if different and not accept_other:
        shown = ", ".join(f"{base} ({name})" for name, base in different.items())
        raise ValueError(f"The adapters were made for different bases: {shown}. {_OTHER_BASE}")
    return next(iter(fingerprints.values())) if len({*fingerprints.values()}) == 1 and not different else ""


def _settled(adapter: PeftAdapter, name: str, base: str | Path | None) -> PeftAdapter:
    """The adapter without copies of base weights, its experts as the base stores them if the base is known."""
    if adapter.token_rows:
        raise ValueError(
            f"{name} has trained rows of tokens ({', '.join(adapter.token_rows)}), which are not summed. Merge it with "
            "`lora-converter merge`, and train the others on the result."
        )
    if base is not None:
        plan = plan_merge(open_model(base), adapter, name)
        if plan.replaced:
            raise ValueError(base_weights_in_training(name, plan.replaced))
        return replace(plan.peft, base_weights={}, modules_to_save=[])
    if adapter.init:
        raise ValueError(
            f"{name} belongs to a base that PEFT changed (init_lora_weights = {adapter.init!r}). Name the base as it "
            "was with --base: a plain adapter is made of it first."
        )
    if adapter.base_weights:
        raise ValueError(
            f"{name} brings {', '.join(adapter.base_weights)}, and only the base tells whether they are changed. Name "
            "its Hugging Face directory with --base."
        )
    return adapter


def _under_common_names(adapters: Sequence[PeftAdapter], names: Sequence[str]) -> list[PeftAdapter]:
    """The adapters with one name for each module, that which the first has for it.

    Raises:
        ValueError: An adapter has other names, and modules that have no counterpart whose name would tell theirs.
    """
    result: list[PeftAdapter] = []
    known: dict[str, None] = {}
    for name, adapter in zip(names, adapters, strict=True):
        renamed = adapter.renamed(Aliases(known)) if known else adapter
        there = [old for old, new in zip(adapter.factors, renamed.factors, strict=True) if old != new]
        alone = [module for module in renamed.factors if module not in known]
        if there and alone:
            raise ValueError(
                f"{name} has another name for {there[0]} than the adapters before it, which do not adapt "
                f"{', '.join(alone)}. Rename its keys to theirs."
            )
        known |= dict.fromkeys(renamed.factors)
        result.append(renamed)
    return result


def _check_experts(adapters: Sequence[PeftAdapter], names: Sequence[str]) -> None:
    """Refuses routed experts of one layer in several forms, between which only the base's own form decides."""
    forms: dict[str, dict[tuple[object, ...], str]] = {}
    for name, adapter in zip(names, adapters, strict=True):
        for module, (a, _) in adapter.factors.items():
            parts = split_expert(module)
            form: tuple[object, ...]
            if a.ndim == 3:
                layer = module.rpartition(".")[0]
                form = (layer, "stacked", goes_over_second([], flagged=False, version=adapter.peft_version))
            elif parts:
                layer, _, product = parts
                form = (layer, "one by one", product in SPELLINGS[0])
            else:
                continue
            forms.setdefault(layer.replace(".block_sparse_moe.", ".mlp."), {}).setdefault(form, name)
    for layer, found in forms.items():
        if len(found) > 1:
            one, two = list(found.values())[:2]
            raise ValueError(
                f"{one} and {two} hold the routed experts of {layer} in different forms. Name the base's Hugging Face "
                "directory with --base."
            )


def _widest(adapters: Sequence[PeftAdapter]) -> torch.dtype:
    dtypes = [factor.dtype for adapter in adapters for pair in adapter.factors.values() for factor in pair]
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def describe(combined: Combined, *, per_module: bool) -> str:
    """Ranks and exactness of a sum, in words.

    Args:
        per_module: With a line for each module, and one for each product of a layer's experts.
    """
    found = combined.adapter
    groups: dict[str, list[str]] = {}
    for module in found.factors:
        parts = split_expert(module)
        groups.setdefault(f"{parts[0]}.*.{parts[2]}" if parts else module, []).append(module)
    lines = []
    for name, modules in groups.items() if per_module else ():
        of_group = [combined.deviations[module] for module in modules]
        rank, full = max(map(found.rank_of, modules)), max(each.full_rank for each in of_group)
        lines.append(f"{name}  rank {rank} of {full}  relative error {_relative(of_group):.2e}")
    if zero := sum(not each.norm for each in combined.deviations.values()):
        lines.append(f"{zero} modules have no update: their terms cancel, or are zero.")
    ranks = ", ".join(map(str, sorted({found.rank_of(module) for module in found.factors})))
    dtype, error = str(combined.dtype).removeprefix("torch."), _relative(combined.deviations.values())
    lines.append(f"{len(found.factors)} modules of rank {ranks} in {dtype}: relative error {error:.2e} (Frobenius).")
    return "\n".join(lines)


def _relative(deviations: Iterable[Deviation]) -> float:
    norm, error = map(math.hypot, *((each.norm, each.error) for each in deviations))
    return error / norm if norm else math.inf if error else 0.0
