"""A run's adapters as a PEFT directory, with the tokenizer that has its new tokens."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from lora_converter.hf.bridge import alphas_of, to_peft
from lora_converter.hf.packed_base import packed_base
from lora_converter.hf.peft_directory import is_peft_directory, save_peft
from lora_converter.hf.tokenizer_files import write_tokenizer
from lora_converter.ranks import is_first_rank
from lora_converter.run.description import Description
from lora_converter.run.initial_factors import TWICE_THE_RANK
from lora_converter.run.model import RunModel
from lora_converter.run.steps import discard

logger = logging.getLogger(__name__)


@torch.no_grad()
def write_peft(model: RunModel, path: str) -> None:
    """Writes the adapters as a PEFT directory, on rank 0. The other ranks do not wait for it. A collective."""
    job, adapter = model.host.job, model.host.naming
    assert adapter is not None
    names, linears, configs = model.peft_names(), model.linear_shapes(), model.configs()
    has_experts, experts = model.has_experts(), model.expert_shapes()
    gathered, magnitudes = model.gather_for_peft(job.export_dtype)
    if not is_first_rank():
        return
    peft = to_peft(
        adapter,
        gathered,
        names,
        linears,
        job.config.of_plain(),
        experts=experts,
        alphas=alphas_of(names, {fqn: config.of_plain() for fqn, config in configs.items()}),
        magnitudes=magnitudes,
        has_experts=has_experts,
        base_model=job.base.path if job.base else "",
        base_fingerprint=model.base_fingerprint,
        packed=packed_base(adapter, model.packed),
        tokens=sorted(job.tokens.values()),
    )
    if not is_peft_directory(path):
        discard(Path(path))
    beside = {"beside": functools.partial(write_tokenizer, job.tokenizer, job.tokens)} if job.tokens else {}
    save_peft(peft, path, dtype=job.export_dtype, replace=True, **beside)
    logger.info(f"LoRA: wrote {len(configs)} adapted modules as a PEFT directory to {path}.")
    if job.config.init:
        logger.info(TWICE_THE_RANK.format(rank=max(a.shape[0] for a, _ in peft.factors.values())))


def tokenizer_of(path: str | Path, base: str = "") -> Callable[[Path], None]:
    """What writes the tokenizer of a step with new tokens into a folder: that of its base, with the tokens.

    Args:
        base: The run's own if left out.
    """

    def write(target: Path) -> None:
        described = Description.read(path)
        if described is None or not described.tokens:
            return
        try:
            write_tokenizer(base or described.base, described.tokens, target)
        except ValueError as e:  # the run's was another folder's
            logger.warning("LoRA: no tokenizer with the new tokens is written: %s", e)

    return write
