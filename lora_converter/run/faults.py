"""Adapters that do not train, told once, by name: no gradient, still zero, not finite.

Looked at after the first step of a launch, at every step that is saved, and when the gradient norm that the trainer
logs is not finite: steps at which ranks and devices wait for each other anyhow. The steps between cost nothing.
What one rank sees of a sharded adapter is a part, so the verdict is that of all ranks.
"""

import logging
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn

from lora_converter.adapted import adapted_modules
from lora_converter.ranks import union_over_ranks
from lora_converter.tensors import local_part
from lora_converter.trained import trained_modules

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Name of an adapted module, and of a parameter below it."""

NO_GRADIENT = "got no gradient in the whole step; is their part of the model used?"
ALL_ZERO = "are still zero, so they change nothing; is the learning rate above 0?"
NOT_FINITE = "hold nan or inf"


class FaultWatch:
    """Looks at the adapters of a run between its steps.

    Args:
        model_parts: The models of this rank; several with pipeline stages.
    """

    def __init__(self, model_parts: Sequence[nn.Module]):
        self._model_parts = model_parts
        self._reported: set[tuple[str, str]] = set()
        self._steps = 0
        self._norm_is_finite = True

    def on_log(self, grad_norm: float) -> None:
        """The gradient norm of a step, the same on all ranks; losses differ under PP."""
        self._norm_is_finite = math.isfinite(grad_norm)

    def after_step(self, step: int, *, saves: bool) -> bool:
        """To be called after each step, before the gradients go.

        Args:
            saves: The step is to be saved. On all ranks or none.

        Returns:
            Whether the adapters are finite, as far as was looked.
        """
        self._steps += 1
        suspicious, self._norm_is_finite = not self._norm_is_finite, True
        if not (saves or suspicious or self._steps == 1):
            return True
        adapted = {module.lora_fqn: module for part in self._model_parts for module in adapted_modules(part)}
        params = {(fqn, name): p for fqn, m in adapted.items() for name, p in m.adapter_parameters().items()}
        trained = {fqn: module for part in self._model_parts for fqn, module in trained_modules(part).items()}
        params |= {(fqn, name): p for fqn, m in trained.items() for name, p in m.named_parameters(recurse=False)}
        gradients = {key: param.grad for key, param in params.items() if param.grad is not None}
        largest = _largest({key: param.detach() for key, param in params.items()})
        self._report(step, NO_GRADIENT, _zero_on_all_ranks(_by_module([*adapted, *trained], _largest(gradients))))
        if self._steps > 1:
            begins_at_zero = {
                (fqn, name): size
                for (fqn, name), size in largest.items()
                if fqn in adapted and name in adapted[fqn].zero_at_start
            }
            can_be_zero = [fqn for fqn, module in adapted.items() if module.zero_at_start]
            self._report(step, ALL_ZERO, _zero_on_all_ranks(_by_module(can_be_zero, begins_at_zero)))
        broken = {fqn for (fqn, _), size in largest.items() if not math.isfinite(size)}
        broken_anywhere = union_over_ranks([fqn for fqn in (*adapted, *trained) if fqn in broken])
        self._report(step, NOT_FINITE, broken_anywhere)
        return not broken_anywhere

    def _report(self, step: int, fault: str, fqns: list[str]) -> None:
        new = [fqn for fqn in fqns if (fault, fqn) not in self._reported]
        self._reported.update((fault, fqn) for fqn in new)
        if new:
            logger.error(f"LoRA: step {step}: {len(new)} adapters {fault}: {', '.join(new)}.")


def _largest(tensors: dict[Key, torch.Tensor]) -> dict[Key, float]:
    """The largest magnitude in each tensor, of this rank's shards: nan if there is one, 0 for no element."""
    parts = {key: local for key, value in tensors.items() if (local := local_part(value)).numel()}
    norms = torch._foreach_norm(list(parts.values()), math.inf) if parts else ()
    found = dict.fromkeys(tensors, 0.0)
    return found | dict(zip(parts, torch.stack(list(norms)).tolist() if norms else [], strict=True))


def _by_module(fqns: Iterable[str], sizes: dict[Key, float]) -> dict[str, bool]:
    """Whether anything of a module is not zero. What has no entry in `sizes` is."""
    alive = {fqn for (fqn, _), size in sizes.items() if size != 0}
    return {fqn: fqn in alive for fqn in fqns}


def _zero_on_all_ranks(alive_here: dict[str, bool]) -> list[str]:
    """Names of what is zero on every rank that has a part of it."""
    zero = union_over_ranks([name for name, alive in alive_here.items() if not alive])
    alive = set(union_over_ranks([name for name in zero if alive_here.get(name)])) if zero else set()
    return [name for name in zero if name not in alive]
