"""Two phases in one job: all weights first, then adapters on the result.

    phase 1    torchtitan's own training of every weight, for lora.full_phase.steps, in <checkpoint.folder>_full_phase
    phase 2    the LoRA job, whose base is the last checkpoint of phase 1, in <checkpoint.folder>

Each is a run of its own, with an optimizer and a schedule of its own, that resumes from its own folder; phase 1 is
over when its last checkpoint is complete. So a job that is killed anywhere and launched again continues where it was,
and the model at the start of phase 2 is the model at the end of phase 1, since the update of new adapters is zero.
"""

import copy
import functools
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer

from lora_converter.adapters import apply_lora
from lora_converter.ranks import on_first_rank
from lora_converter.run.claim import Claim
from lora_converter.run.preemption import Preemption
from lora_converter.titan.checks import check_expert_biases, check_settings
from lora_converter.titan.experts import EXPERT_CLASSES
from lora_converter.titan.host import log_phase
from lora_converter.titan.installed import change_trainer
from lora_converter.titan.job import FULL_PHASE_FOLDER, full_phase_result
from lora_converter.titan.models import built_on_meta
from lora_converter.titans.host import end_process


def read_the_command_line_late(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    """`ConfigManager.parse_args`, whose default is the command line as it is when it is called."""

    @functools.wraps(parse_args)
    def parse(self: Any, args: list[str] | None = None) -> Any:
        return parse_args(self, sys.argv[1:] if args is None else args)

    return parse


def run_full_phase(job_config: Any) -> list[str]:
    """Trains phase 1, if the job has one and it is not over.

    Returns:
        Options that make the job phase 2, to be added to its command line.

    Raises:
        ValueError: The job's settings cannot work; nothing was trained then.
    """
    phase = job_config.lora.full_phase
    if phase.steps == 0 or job_config.checkpoint.create_seed_checkpoint:
        return []
    init_logger()
    check_settings(job_config)
    _check_targets(job_config)
    result = full_phase_result(job_config)
    if os.path.isfile(os.path.join(result, ".metadata")):
        logger.info(f"LoRA: phase 1 of 2 is over, its result is {result}.")
    else:
        logger.info(f"LoRA: phase 1 of 2, all weights, {phase.steps} steps.")
        _train(full_phase_config(job_config))
        gc.collect()  # its weights and optimizer, before phase 2 needs the memory
    logger.info(f"LoRA: phase 2 of 2, adapters, {job_config.training.steps} steps.")
    return [
        f"--checkpoint.initial_load_path={result}",
        "--checkpoint.no-initial_load_in_hf",
        "--checkpoint.no-initial_load_in_hf_quantized",
    ]


def _check_targets(job_config: Any) -> None:
    """Selects the targets of phase 2 on a model without weights: a wrong name is told before phase 1, not after it."""
    spec = get_train_spec(job_config.model.name)
    model = built_on_meta(spec, spec.model_args[job_config.model.flavor], job_config)
    check_expert_biases(model, job_config.parallelism)
    apply_lora(model, job_config.lora, expert_classes=EXPERT_CLASSES)


def full_phase_config(job_config: Any) -> Any:
    """The job as phase 1 runs it."""
    config = copy.deepcopy(job_config)
    phase = config.lora.full_phase
    config.model.converters = [name for name in config.model.converters if name != "lora"]
    config.training.steps = phase.steps
    config.training.dataset = phase.dataset or config.training.dataset
    config.training.dataset_path = phase.dataset_path or config.training.dataset_path
    config.optimizer.lr = phase.lr or config.optimizer.lr
    config.chat.epochs = 0.0  # which would set the steps
    config.lr_scheduler.total_steps = None
    config.metrics.save_tb_folder += FULL_PHASE_FOLDER
    checkpoint = config.checkpoint
    checkpoint.folder += FULL_PHASE_FOLDER
    checkpoint.load_step = -1
    checkpoint.last_save_model_only, checkpoint.last_save_in_hf, checkpoint.export_dtype = True, False, "float32"
    return config


def _train(config: Any) -> None:
    trainer = Trainer(config)
    log_phase(trainer, 1)
    checkpointer, preemption = trainer.checkpointer, Preemption()
    claim = Claim(checkpointer.folder.removesuffix(FULL_PHASE_FOLDER))
    on_first_rank(claim.hold)

    def saved_before_the_end(save: Callable[..., None]) -> Callable[..., None]:
        def save_or_end(step: int, last_step: bool = False) -> None:
            ends = not last_step and preemption.ends_after(step)
            if ends:
                checkpointer.interval = 1  # saves this step
            save(step, last_step)
            if ends:
                checkpointer._async_wait()
                end_process(trainer, preemption.exit_code)

        return save_or_end

    change_trainer(trainer, "checkpointer.save", saved_before_the_end)
    preemption.listen(0)
    try:
        trainer.train()
    finally:
        trainer.close()
        preemption.close()
        claim.release()
