"""Where the rows of new tokens begin (`[lora] new_tokens`), computed once for a job from the base that was loaded.

Sums differ in their last digits from one machine or number of threads to another, so the first rank that has a part of
a weight sends the others what it found. Steps store it as they do what has been trained.
"""

import logging

import torch
import torch.distributed as dist

from lora_converter.new_tokens import GrownInFull, grown_in_full, token_rows
from lora_converter.ranks import gather_all
from lora_converter.run.description import MODEL
from lora_converter.run.job import Job
from lora_converter.run.model import RunModel
from lora_converter.run.steps import Step
from lora_converter.tensors import reshard
from lora_converter.token_rows import TokenRows

logger = logging.getLogger(__name__)


def begins_with_new_rows(job: Job, found: Step | None) -> bool:
    """Whether a run needs first rows of its new tokens. Adapters from elsewhere that have some take their place.

    Args:
        found: The step that it goes on from. Step 0 is a seed checkpoint, of rows that are not there yet.
    """
    if not job.base or all(token < job.base_rows for token in job.tokens.values()):
        return False
    return found is None or found.number == 0 or MODEL in job.not_loaded


class InitialRows:
    """A source like others: `check`, then `load` after the base."""

    def __init__(self, model: RunModel):
        self._model = model

    def check(self) -> None:
        """Nothing: what cannot have rows of its own is refused when they are put on."""

    @torch.no_grad()
    def load(self) -> None:
        """Sets the rows of the tokens that the base has not. A collective."""
        job = self._model.host.job
        for part in self._model.parts:
            reshard(part)
        rows: dict[str, TokenRows | GrownInFull] = {}
        for part in self._model.parts:
            rows |= token_rows(part)
            rows |= grown_in_full(part)
        everyone = gather_all(sorted(rows))
        for name in sorted({name for names in everyone for name in names}):
            ranks = [rank for rank, names in enumerate(everyone) if name in names]
            group = dist.new_group(ranks) if 1 < len(ranks) < len(everyone) else None  # every rank makes each group
            if name not in rows:
                continue
            found = rows[name].initial_rows(job.seed, computes=len(ranks) == 1 or dist.get_rank() == ranks[0])
            if len(ranks) > 1:
                dist.broadcast(found, src=ranks[0], group=group)
            rows[name].set_initial_rows(found)
        new = sum(token >= job.base_rows for token in job.tokens.values())
        logger.info(f"LoRA: the rows of {new} new tokens begin at the mean of the base's {job.base_rows:,}.")
