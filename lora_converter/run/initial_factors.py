"""The factors that begin at the base's weights (`[lora] init`), computed once for a job and sent to who needs them.

Decompositions differ in their last digits from machine to machine and from one number of threads to another, so no two
ranks compute the same one: each weight's is one rank's work, and ranks work on different weights at the same time.
Steps store what was computed, since a resume must not change the model.
"""

import logging
import time

import torch
import torch.distributed as dist

from lora_converter.offset import OffsetLinear, initial_factors
from lora_converter.ranks import gather_all, together
from lora_converter.run.description import MODEL
from lora_converter.run.job import Job
from lora_converter.run.model import RunModel
from lora_converter.run.steps import Step
from lora_converter.tensors import is_finite, local_part, reshard

logger = logging.getLogger(__name__)

TWICE_THE_RANK = (
    "LoRA: what began at the base's weights is written as plain adapters of twice their rank, up to {rank}: a server's "
    "limit, vLLM's --max-lora-rank say, must be no lower."
)


def begins_at_the_base(job: Job, found: Step | None) -> bool:
    """Whether a run needs first factors of its base: nothing else that it loads holds any.

    Args:
        found: The step that it goes on from. Step 0 is a seed checkpoint, of no factors yet.
    """
    if not job.config.init:
        return False
    if found is None:
        return not job.config.initial_adapter_path
    return found.number == 0 or MODEL in job.not_loaded


class InitialFactors:
    """What the factors begin at where no step says it. A source like others: `check`, then `load` after the base."""

    def __init__(self, model: RunModel):
        self._model = model

    def check(self) -> None:
        """Nothing: what cannot begin at its weight is refused when adapters are put on."""

    @torch.no_grad()
    def load(self) -> None:
        """Sets the factors of the weights that are there. A collective."""
        start = time.perf_counter()
        for part in self._model.parts:
            reshard(part)
        modules = [module for module in self._model.adapted if isinstance(module, OffsetLinear)]
        together(lambda: self._check_finite(modules))
        ranks, group = _sharers([module.lora_fqn for module in modules])
        for first in range(0, len(modules), len(ranks)):
            _set_factors(modules[first : first + len(ranks)], ranks, group)
        init, seconds = self._model.host.job.config.init, time.perf_counter() - start
        logger.info(f"LoRA: the factors begin at {len(modules)} weights here ({init}), computed in {seconds:.1f} s.")

    def _check_finite(self, modules: list[OffsetLinear]) -> None:
        if wrong := [module.lora_fqn for module in modules if not is_finite(local_part(module.weight).detach())]:
            init = self._model.host.job.config.init
            raise ValueError(f"lora.init = {init!r}: the base's weights of {', '.join(wrong)} hold nan or inf.")


def _sharers(fqns: list[str]) -> tuple[list[int], dist.ProcessGroup | None]:
    """The ranks that hold parts of the same modules, this one among them: its pipeline stages'. A collective."""
    everyone = gather_all(tuple(fqns))
    if not dist.is_initialized():
        return [0], None
    own = None
    for modules in dict.fromkeys(everyone):  # every rank takes part in making each group
        ranks = [rank for rank, others in enumerate(everyone) if others == modules]
        group = dist.new_group(ranks) if len(ranks) < len(everyone) else dist.group.WORLD
        own = (ranks, group) if modules == tuple(fqns) else own
    assert own is not None
    return own


def _set_factors(modules: list[OffsetLinear], ranks: list[int], group: dist.ProcessGroup | None) -> None:
    """Each of the ranks computes those of one module, at the same time, and sends them to the others."""
    me = ranks.index(dist.get_rank()) if dist.is_initialized() else 0
    mine: list[torch.Tensor] = []
    for index, module in enumerate(modules):
        whole = module.whole_weight()  # one at a time on each rank, but for the one that it keeps
        mine += [whole] if index == me else []
        like = whole.new_empty(0, dtype=torch.float32)
    if mine:
        mine = [*initial_factors(mine.pop(), modules[me].lora_config, name=modules[me].lora_canonical_name)]
    for index, module in enumerate(modules):
        rank = module.lora_config.rank
        shapes = [(rank, module.in_features), (module.out_features, rank)]
        a, b = (f.contiguous() for f in (mine if index == me else [like.new_empty(shape) for shape in shapes]))
        if len(ranks) > 1:
            for factor in (a, b):
                dist.broadcast(factor, src=ranks[index], group=group)
        module.set_factors(a, b)
