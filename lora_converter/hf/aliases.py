"""One module has several names: hubs, transformers' versions and wrappers put different parts before it.

    transformer.h.0.attn.c_attn            h.0.attn.c_attn                    GPT-2 in a model, and on the hub
    model.language_model.layers.0.mlp      model.layers.0.mlp                 a text model inside a larger one

A name that is not there is looked for under transformers' own renaming of checkpoints, where it is installed, and then
by its end: the name that shares the longest one, where both differ in wrappers alone. Two such names are an error.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)

_WRAPPERS = {"model", "transformer", "language_model", "base_model", "module", "text_model", "gpt_neox", "backbone"}


class Aliases:
    """The modules that there are, found by the names that others have for them.

    Args:
        known: Names of modules.
        model_type: transformers', for its renaming of checkpoints; empty if not known.
    """

    def __init__(self, known: Iterable[str], model_type: str = ""):
        self._known = dict.fromkeys(known)
        self._model_type = model_type
        self._by_end: dict[str, list[str]] = defaultdict(list)
        for name in self._known:
            self._by_end[_last(name)].append(name)

    def find(self, module: str) -> str | None:
        """The one that `module` means; None if there is none.

        Raises:
            ValueError: It may be any of several; all are named.
        """
        if module in self._known:
            return module
        if module in self._renamed:
            return self._renamed[module]
        candidates: dict[int, list[str]] = defaultdict(list)
        for name in self._by_end.get(_last(module), []):
            common, differing = _compare(module, name)
            if differing <= _WRAPPERS:
                candidates[common].append(name)
        best = candidates[max(candidates)] if candidates else []
        if len(best) > 1:
            raise ValueError(f"{module} may be any of {', '.join(best)}")
        return best[0] if best else None

    def find_all(self, modules: Iterable[str]) -> dict[str, str]:
        """Module -> the one that it means, of those that are found; what is renamed is logged once.

        Raises:
            ValueError: One may be any of several, or two mean the same one.
        """
        found = {module: name for module in modules if (name := self.find(module)) is not None}
        meant: dict[str, str] = {}
        for module, name in found.items():
            if other := meant.get(name):
                raise ValueError(f"{other} and {module} are both {name}")
            meant[name] = module
        renamed = [(module, name) for module, name in found.items() if module != name]
        if renamed:
            logger.info("%d modules have other names here, as %s is %s.", len(renamed), *renamed[0])
        return found

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """transformers' names of the modules of a checkpoint -> the checkpoint's."""
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key

            mapping: Any = get_checkpoint_conversion_mapping(self._model_type) or []
            renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            names = {rename_source_key(f"{name}.weight", renamings, [])[0]: name for name in self._known}
        except Exception as e:  # not installed, an older one, or one that has changed: the rule of ends is left
            logger.debug("transformers' renaming is not used: %r", e)
            return {}
        return {renamed.removesuffix(".weight"): name for renamed, name in names.items()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _compare(ours: str, theirs: str) -> tuple[int, set[str]]:
    """How many last parts two names share, and the parts that they have before them."""
    a, b = ours.split("."), theirs.split(".")
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return common, {*a[: len(a) - common], *b[: len(b) - common]}
