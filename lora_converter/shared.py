"""One parameter, two owners: an update that is merged into it changes both."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn as nn
from torch.distributed.tensor import DTensor

from lora_converter.names import owners


def _others(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Of parameters of these names, the other names that the same parameter has."""
    names_of, param_of = defaultdict(list), {}
    for name, param in owners(model):
        names_of[id(param)].append(name)
        param_of[name] = id(param)
    found = {name: [other for other in names_of[param_of[name]] if other != name] for name in names}
    return {name: others for name, others in found.items() if others}


def check_not_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses to change parameters that other modules own too.

    Raises:
        ValueError: There are some; all owners are named.
    """
    if shared := _others(model, names):
        shown = "; ".join(f"{name} is {', '.join(others)} as well" for name, others in shared.items())
        raise ValueError(
            f"An update that is merged would change other modules too: {shown}. Untie them first, or use "
            "merge_and_unload on an unsharded model, which does."
        )


def untie(model: nn.Module, weights: Sequence[tuple[nn.Module, str]]) -> None:
    """Gives modules copies of their own of parameters that others own too; a transformers config says so then.

    Args:
        weights: Adapted module and name of its weight.

    Raises:
        ValueError: One is sharded; the model is then as it was.
    """
    by_name = {f"{module.lora_fqn}.{name}": (module, name) for module, name in weights}
    shared = _others(model, by_name)
    if sharded := [name for name in shared if isinstance(by_name[name][0].get_parameter(by_name[name][1]), DTensor)]:
        check_not_shared(model, sharded)
    for full_name in shared:
        module, name = by_name[full_name]
        param = module.get_parameter(name)
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        owner.register_parameter(last, nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad))
    if shared:
        _say_untied(getattr(model, "config", None))


def _say_untied(config: Any) -> None:
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
