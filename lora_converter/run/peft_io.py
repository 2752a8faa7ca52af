"""PEFT directories of a run: written at its end, read at its start, and made of step folders without a run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_converter.adapted import AdaptedModule, adapter_parameters, has_stacked_experts, modules_of
from lora_converter.adapters import apply_lora
from lora_converter.config import LoRAConfig
from lora_converter.dcp.reader import METADATA_FILE, read_metadata
from lora_converter.dcp.reader import load as load_dcp
from lora_converter.dora import CHANGE, DoRALinear
from lora_converter.experts import expert_shapes, experts_of
from lora_converter.files import digest
from lora_converter.fit import Misfit
from lora_converter.hf.aliases import Aliases
from lora_converter.hf.bridge import LinearShapes, names_of_linears, to_peft
from lora_converter.hf.expert_bridge import HostExperts, briefly, fitted_to, settings_of
from lora_converter.hf.magnitudes import with_norms_of
from lora_converter.hf.naming import StateDictAdapter, hf_name
from lora_converter.hf.packed_base import PackedBase, packed_base
from lora_converter.hf.peft_config import CONFIG_FILE, WEIGHTS_FILE
from lora_converter.hf.peft_directory import PeftAdapter, load_peft
from lora_converter.hf.saved_modules import is_saved, modules_of_keys
from lora_converter.hf.trained_tokens import stored_rows
from lora_converter.linear import LoRALinear, linear_shapes
from lora_converter.new_tokens import token_rows
from lora_converter.offset import OffsetLinear, make_plain
from lora_converter.packing import packable
from lora_converter.ranks import agreed, together
from lora_converter.run.description import DESCRIPTION, Description
from lora_converter.run.host import ModelSource
from lora_converter.run.job import RunConfig
from lora_converter.run.names import HostNames
from lora_converter.run.steps import adapters_in
from lora_converter.targets import select_targets
from lora_converter.token_rows import TokenRows, TokenRowsEmbedding, TokenRowsHead
from lora_converter.trained import tied_to_trained

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)


def load_peft_everywhere(
    path: str, adapter: StateDictAdapter, linears: LinearShapes, experts: Sequence[HostExperts] = ()
) -> PeftAdapter:
    """`load_peft` on every rank, of one and the same adapter, in the names and forms that the model's modules have.

    Args:
        adapter: The model's.
        linears: All linears of the model.
        experts: Its modules of routed experts.

    Raises:
        ValueError: On all ranks, if one cannot read its folder, or if they hold different adapters.
    """
    peft, found = together(lambda: (load_peft(path), digest(Path(path, CONFIG_FILE), Path(path, WEIGHTS_FILE))))
    agreed(found, f"lora.initial_adapter_path: {path} (SHA-256)")
    peft = peft.renamed(Aliases(names_of_linears(adapter, linears)))
    try:
        return fitted_to(peft, experts)
    except ValueError as e:
        raise ValueError(f"lora.initial_adapter_path: {path}: {e}") from None


def config_of_peft(
    config: C,
    peft: PeftAdapter,
    adapter: StateDictAdapter,
    linears: LinearShapes,
    experts: Sequence[HostExperts] = (),
) -> C:
    """`[lora]` for a run that starts from a PEFT directory: what is left at its default comes from the directory.

    Rank, alpha, their patterns, rsLoRA and targets; dropout stays the run's own affair.

    Args:
        peft: As `load_peft_everywhere` gives it.

    Raises:
        ValueError: A setting is not at its default and differs from the directory's.
    """
    default, what = LoRAConfig(), config.initial_adapter_path
    if config.init and not peft.init:
        raise ValueError(
            f"lora.init = {config.init!r}, but the adapter in {what} says where it begins. Leave lora.init out."
        )
    for name, value in peft.settings.items():
        if getattr(config, name) not in (getattr(default, name), value):
            raise ValueError(
                f"lora.{name} = {getattr(config, name)!r}, but the adapter in {what} has {value!r}. "
                f"Leave lora.{name} out to take the adapter's."
            )
    modules = {fqn: module for fqn, shape in linears.items() if (module := _module_of(peft, adapter, fqn, shape))}
    weights, of_experts = _experts_of(peft, experts, what)
    if other := {rank for rank, _ in of_experts.values() if config.expert_rank not in (0, rank)}:
        raise ValueError(
            f"lora.expert_rank = {config.expert_rank}, but experts of the adapter in {what} have "
            f"{', '.join(map(str, sorted(other)))}. Leave lora.expert_rank out to take the adapter's."
        )
    if not modules and not weights:
        raise ValueError(f"{what} adapts {', '.join(briefly(sorted(peft.factors)))}; the model has none of them.")
    config = replace(config, **peft.settings)
    if config.target_modules == default.target_modules and not config.exclude_modules:
        config = replace(config, target_modules=[*modules, *weights])
    every = [f"{module.fqn}.{weight}" for module in experts for weight in module.shapes]
    targets = select_targets(
        list(linears), targets=config.target_modules, exclude=config.exclude_modules, experts=every
    )
    if not config.train_also and peft.modules_to_save:
        config = replace(config, train_also=trained_in(peft, adapter))
    own = {fqn: (peft.rank_of(modules[fqn]), peft.alpha_of(modules[fqn])) for fqn in targets if fqn in modules}
    own |= {fqn: of_experts[fqn] for name in targets if (fqn := name.rpartition(".")[0]) in of_experts}
    ranks = {fqn: rank for fqn, (rank, _) in own.items() if rank != peft.rank}
    alphas = {fqn: alpha for fqn, (_, alpha) in own.items() if alpha != peft.alpha}
    return replace(config, rank_pattern=config.rank_pattern or ranks, alpha_pattern=config.alpha_pattern or alphas)


def trained_in(peft: PeftAdapter, adapter: StateDictAdapter) -> list[str]:
    """The host's names of the modules that a directory has trained in full."""
    return modules_of_keys(
        adapter.from_hf({k: w for k, w in peft.base_weights.items() if is_saved(k, peft.modules_to_save)})
    )


def _experts_of(
    peft: PeftAdapter, experts: Sequence[HostExperts], what: str
) -> tuple[list[str], dict[str, tuple[int, float]]]:
    """The experts' weights that an adapter adapts, and each of their modules' rank and alpha.

    Raises:
        ValueError: Some have another width; all are named.
    """
    weights: list[str] = []
    settings: dict[str, tuple[int, float]] = {}
    misfit = Misfit()
    for module in experts:
        if read := module.read(peft, misfit):
            weights += [each.name for each in read.values()]
            settings[module.fqn] = settings_of(read, peft.use_rslora)
    misfit.raise_if_any(f"{what} does not fit the model.", words={"misshapen": "have another shape"})
    return weights, settings


def _module_of(peft: PeftAdapter, adapter: StateDictAdapter, fqn: str, shape: tuple[int, int]) -> str:
    """The module of `peft` that is a linear of the host's; empty if there is none."""
    try:
        name = hf_name(adapter, fqn, out_features=shape[0], in_features=shape[1])
    except ValueError:
        return ""
    return name if name in peft.factors else ""


def read_step_as_peft(path: str | Path, models: ModelSource, *, base: str = "", custom_import: str = "") -> PeftAdapter:
    """The adapters of a step folder in Hugging Face's names, without a run.

    Args:
        models: The host's.
        base: For `base_model_name_or_path`, and the norms of DoRA; the run's own base if left out.
        custom_import: Module that registers the model with the host; the run's own if left out.

    Raises:
        ValueError: It is no complete step folder of a LoRA run, damaged, or holds adapters that PEFT has no form for.
    """
    described = Description.read(path)
    if described is None:
        raise ValueError(f"{path} is no complete step folder of a LoRA run: it has no {DESCRIPTION}.")
    metadata = read_metadata(path)
    try:
        source = models(described.model, described.flavor, custom_import or described.custom_import)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    model, adapter, classes = source.model, source.state_dict_adapter, source.expert_classes
    host_name = HostNames([*dict(model.named_modules()), *model.state_dict()], source.canonical_name)
    metadata = host_name.of_step(metadata)
    stored = metadata.state_dict_metadata
    of_linears: list[type[AdaptedModule]] = [LoRALinear, DoRALinear, OffsetLinear]
    kinds = [*of_linears, TokenRowsEmbedding, TokenRowsHead, *set(classes.values())]
    linears, experts = linear_shapes(model), expert_shapes(model, classes)
    _, foreign = adapters_in(metadata, kinds, model.state_dict())
    if foreign:
        raise ValueError(f"{path}: PEFT has no form for {', '.join(foreign)}.")
    config, shapes = LoRAConfig(**described.lora), packable(model, classes)
    patterns = [PackedBase.of_patterns(form, own, f"{path}") for form, own in described.packed.items()]
    packed = {host_name(name): each.form for each in patterns for name in each.names()}
    targets = [fqn for fqn in modules_of(stored, [LoRALinear]) if fqn in linears]
    targets += [
        f"{fqn}.{weight}"
        for fqn, (_, kind) in experts_of(model, classes).items()
        for weight, (a, _) in kind.peft_factors.items()
        if f"{fqn}.{a}" in stored
    ]
    if not targets or packed.keys() - shapes.keys():
        raise ValueError(f"{path} is damaged: no adapter is not what {DESCRIPTION} says.")
    config, ids = replace(config, target_modules=targets, exclude_modules=[]), sorted(described.tokens.values())
    adapted = apply_lora(model, config, expert_classes=classes, tokens=ids, canonical_name=source.canonical_name)
    params = adapter_parameters(model)
    wrong = [name for name, param in params.items() if getattr(stored.get(name), "size", None) != param.shape]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} is not what {DESCRIPTION} says.")
    state_dict = {name: torch.empty(param.shape) for name, param in params.items()}
    load_dcp(state_dict, path, metadata, no_dist=True)
    for name, module in token_rows(model).items():
        state_dict[name] += _rows_of_base(base or described.base or f"{path}", adapter, module)
    state_dict |= {other: state_dict[n] for n, others in tied_to_trained(model).items() for other in others}
    changes = {
        f"{m.lora_fqn}.weight": state_dict.pop(f"{m.lora_fqn}.{CHANGE}") for m in adapted if isinstance(m, DoRALinear)
    }
    if base and (changes or ids) and Path(base).name.lower() != Path(described.base).name.lower():
        logger.warning("The run's base is %r. What it adds to is taken from %s, as its copy.", described.base, base)
    make_plain(state_dict)
    peft = to_peft(
        adapter,
        state_dict,
        {weight: names for linear in adapted for weight, names in linear.peft_names().items()},
        linears,
        config.of_plain(),
        experts=experts,
        alphas={weight: linear.lora_config.of_plain().alpha for linear in adapted for weight in linear.peft_names()},
        magnitudes=changes,
        has_experts=has_stacked_experts(model),
        base_model=base or described.base,
        base_fingerprint=described.base_fingerprint,
        packed=packed_base(adapter, {name: (form, shapes[name]) for name, form in packed.items()}),
        tokens=ids,
    )
    return with_norms_of(peft, base or described.base, f"{path}")


def _rows_of_base(base: str, adapter: StateDictAdapter, module: TokenRows) -> torch.Tensor:
    """The base's rows of a module's tokens, (tokens, width), of a Hugging Face or a DCP folder."""
    weight, ids = f"{module.lora_fqn}.weight", module.lora_token_ids
    if not Path(base, METADATA_FILE).exists():
        (key,) = adapter.to_hf({weight: torch.empty(module.weight.shape, device="meta")})
        return stored_rows(base, key, ids)
    metadata: Any = read_metadata(base)
    whole = torch.zeros(metadata.state_dict_metadata[weight].size)  # a random base is a step's own, with more rows
    load_dcp({weight: whole}, base, metadata, no_dist=True)
    return torch.stack([whole[i] if i < len(whole) else torch.zeros(whole.shape[1]) for i in ids])
