"""The adapters of a live model as a PEFT directory and back, for models whose module names are Hugging Face's.

    save_peft(from_model(model), "my_adapter")
    into_model(load_peft("my_adapter"), model)

A torchtitan model has names of its own: its trainer writes and reads the directories (`run/peft_io.py`). What such a
directory holds and what is refused stands in `hf/peft_directory.py` and `hf/peft_config.py`.
"""

import math
from collections import Counter

import torch
import torch.nn as nn

from lora_converter.adapted import adapted_modules, check_peft_forms, has_stacked_experts
from lora_converter.dora import CHANGE, DoRALinear
from lora_converter.hf.aliases import Aliases
from lora_converter.hf.changed_base import check_way_round
from lora_converter.hf.expert_patterns import linears_like_experts
from lora_converter.hf.magnitudes import check_no_magnitudes_of_parameters, magnitude_changes
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.peft_adapter import PeftAdapter, base_weights_in_training
from lora_converter.hf.peft_config import CONFIG_FILE, PEFT_VERSION, WEIGHTS_FILE
from lora_converter.hf.peft_directory import is_peft_directory, load_peft, save_peft, update_peft
from lora_converter.hf.saved_modules import is_same_weight, modules_of_keys
from lora_converter.hf.trained_tokens import TokenRows, module_in, rows_in_copy
from lora_converter.linear import LoRALinear
from lora_converter.names import plain_modules, plain_parameters
from lora_converter.new_tokens import token_rows
from lora_converter.offset import make_plain
from lora_converter.packed_linear import PackedLinear
from lora_converter.state_dict import adapter_configs, adapter_state_dict, load_adapter_state_dict
from lora_converter.tensors import full_tensor
from lora_converter.trained import tied_to_trained, trained_parameters

__all__ = [
    "CONFIG_FILE",
    "PEFT_VERSION",
    "WEIGHTS_FILE",
    "PeftAdapter",
    "from_model",
    "into_model",
    "is_peft_directory",
    "load_peft",
    "save_peft",
    "update_peft",
]


def from_model(model: nn.Module, *, base_model: str = "") -> PeftAdapter:
    """The adapters of a model whose module names are Hugging Face's, such as one of transformers', for `save_peft`.

    A collective on sharded models.

    Raises:
        ValueError: The model has no adapters, or some that PEFT cannot express.
    """
    adapted = list(adapted_modules(model))
    check_peft_forms(adapted)
    state, names = adapter_state_dict(model), _peft_names(model)
    make_plain(state)
    configs = {fqn: config.of_plain() for fqn, config in adapter_configs(model).items()}
    if experts := [fqn for fqn, (a, _) in names.items() if state[a].ndim != 2]:
        raise ValueError(
            f"PEFT's names of routed experts are known to a run on their host alone, which writes a PEFT directory at "
            f"its end. A model by itself does not tell them: {', '.join(experts)}."
        )
    ranks = Counter(config.rank for config in configs.values())
    alphas = Counter(config.alpha for config in configs.values())
    (rank, _), (alpha, _) = ranks.most_common(1)[0], alphas.most_common(1)[0]
    config = next(iter(configs.values()))
    saved = {name: state[name] for name in trained_parameters(model)}
    tokens = {m.lora_fqn: TokenRows([*m.lora_token_ids], m.whole_rows()) for m in token_rows(model).values()}
    saved |= {other: saved[name] for name, others in tied_to_trained(model).items() for other in others}
    as_parameters = linears_like_experts(names) if has_stacked_experts(model) else []
    check_no_magnitudes_of_parameters(config.use_dora, as_parameters)
    return PeftAdapter(
        factors={fqn: (state[a], state[b]) for fqn, (a, b) in sorted(names.items())},
        rank=rank,
        alpha=alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted(names.keys() - set(as_parameters)),
        base_model=base_model,
        fan_in_fan_out=any(isinstance(module, LoRALinear) and module.lora_transposed for module in adapted),
        packed=_packed_base(model),
        alphas={fqn: own.alpha for fqn, own in configs.items() if own.alpha != alpha and fqn not in tokens},
        target_parameters=[f"{module}.weight" for module in as_parameters],
        base_weights=saved,
        modules_to_save=modules_of_keys(saved),
        magnitudes={module.lora_fqn: module.magnitude() for module in adapted if isinstance(module, DoRALinear)},
        token_rows=tokens,
    )


def into_model(adapter: PeftAdapter, model: nn.Module) -> None:
    """Copies an adapter into the adapters of a model whose module names are Hugging Face's. All ranks.

    Raises:
        ValueError: Names, shapes or the scaling do not fit; nothing is written.
    """
    _check_beginnings(adapter, model)
    adapter = adapter.renamed(Aliases(adapter_configs(model)))
    params = dict(plain_parameters(model))
    trained = trained_parameters(model)
    owned = {*trained, *(other for others in tied_to_trained(model).values() for other in others)}
    copies = {name: copy for name, copy in adapter.base_weights.items() if name not in owned}
    rows = _token_rows(adapter, model, copies)
    other = [n for n, copy in copies.items() if n not in params or not is_same_weight(copy, full_tensor(params[n]))]
    if other:
        raise ValueError(base_weights_in_training("The adapter", other))
    for fqn, config in adapter_configs(model).items():
        if fqn in adapter.factors and not math.isclose(config.scaling, adapter.scaling_of(fqn)):
            raise ValueError(
                f"The adapter's scaling is {adapter.scaling_of(fqn):g}, that of {fqn} {config.scaling:g}: give "
                f"apply_lora rank = {adapter.rank_of(fqn)}, alpha = {adapter.alpha_of(fqn):g}, "
                f"use_rslora = {adapter.use_rslora}, or the like in its patterns."
            )
    a, b = LoRALinear.adapter_parameter_names
    names = {module: (f"{module}.{a}", f"{module}.{b}") for module in adapter.factors} | _peft_names(model)
    state = {n: f for module, pair in adapter.factors.items() for n, f in zip(names[module], pair, strict=True)}
    state |= {n: w for n, w in adapter.base_weights.items() if n in trained}
    if adapter.init:  # what they began at is the base's, which has not changed
        frozen = {f"{m.lora_fqn}.{name}" for m in adapted_modules(model) for name in m.frozen_parameter_names}
        state |= {name: tensor for name, tensor in adapter_state_dict(model).items() if name in frozen}
    load_adapter_state_dict(model, state | _magnitude_changes(adapter, model) | rows)


def _magnitude_changes(adapter: PeftAdapter, model: nn.Module) -> dict[str, torch.Tensor]:
    """What is added to the norms of the model's rows, of an adapter that has DoRA's magnitudes themselves.

    Raises:
        ValueError: One of the two has magnitudes alone.
    """
    with_magnitude = {m.lora_fqn: m for m in adapted_modules(model) if isinstance(m, DoRALinear)}
    if bool(adapter.magnitudes) != bool(with_magnitude):
        there, here = bool(adapter.magnitudes), bool(with_magnitude)
        raise ValueError(f"The adapter has use_dora = {there}, the model {here}: give apply_lora use_dora = {there}.")
    unknown = {f"{fqn}.{CHANGE}": own for fqn, own in adapter.magnitudes.items() if fqn not in with_magnitude}
    known = [with_magnitude[fqn] for fqn in adapter.magnitudes if fqn in with_magnitude]
    return unknown | magnitude_changes(known, adapter.magnitudes)  # what is unknown is refused by name


def _token_rows(adapter: PeftAdapter, model: nn.Module, copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is added to the model's rows of tokens, of an adapter that has the rows themselves.

    Rows that the adapter has not of a module, and the base has, are as the base has them: PEFT trains an embedding's
    alone, or other tokens' of each.

    Args:
        copies: Whole weights that the adapter has; see `rows_in_copy`.
    """
    found: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, module in token_rows(model).items():
        ids, copied = module.lora_token_ids, rows_in_copy(copies, module)
        file = module_in(adapter.token_rows, module.lora_fqn)
        rows = adapter.token_rows[file] if file else copied
        there = rows.ids if rows else []
        if set(there) <= {*ids} and all(token < module.lora_base_rows or token in there for token in ids):
            found[name] = torch.zeros_like(full_tensor(module.lora_token_rows.detach()))
            if rows:
                places, base = [ids.index(token) for token in there], module.base_rows()
                found[name][places] = rows.rows.to(base) - base[places]
        used |= {own for own, each in adapter.token_rows.items() if own == file or (rows and each.equals(rows))}
    if used < adapter.token_rows.keys() or len(found) < len(token_rows(model)):
        named = {module: sorted(rows.ids) for module, rows in adapter.token_rows.items()}
        raise ValueError(
            f"The adapter has trained rows of tokens of {named or 'no module'}, and the model of others: give "
            f"apply_lora tokens = {sorted({token for ids in named.values() for token in ids})}."
        )
    return found


def _check_beginnings(adapter: PeftAdapter, model: nn.Module) -> None:
    """Refuses factors that began elsewhere than the model's do.

    Raises:
        ValueError: They did; all modules are named.
    """
    configs = adapter_configs(model)
    if not adapter.init and (offset := [fqn for fqn, config in configs.items() if config.init]):
        raise ValueError(
            f"The factors of {', '.join(offset)} began at the weight (init), and what they began at is in no PEFT "
            "directory. Load it into adapters without init, of its rank."
        )
    if other := [fqn for fqn, config in configs.items() if config.init != adapter.init]:
        raise ValueError(
            f"The adapter belongs to a base that PEFT changed (init_lora_weights = {adapter.init!r}), and those of "
            f"{', '.join(other)} do not begin there: give apply_lora init = {adapter.init!r}."
        )
    transposed = [m.lora_fqn for m in adapted_modules(model) if isinstance(m, LoRALinear) and m.lora_transposed]
    check_way_round(adapter, transposed, "The adapter")


def _packed_base(model: nn.Module) -> PackedBase | None:
    """The model's linears with packed weights; None if there are none, or if they are of several formats."""
    forms = {name: module.packed_format for name, module in plain_modules(model) if isinstance(module, PackedLinear)}
    if len(set(forms.values())) != 1:
        return None
    return PackedBase.of(next(iter(forms.values())), [f"{name}.weight" for name in forms])


def _peft_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """PEFT's module -> the adapter parameters that are its lora_A and lora_B."""
    return {
        weight.removesuffix(".weight"): names
        for module in adapted_modules(model)
        for weight, names in module.peft_names().items()
    }
