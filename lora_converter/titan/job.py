"""torchtitan's job config as a `Job`: what a LoRA run needs of it."""

import os
from typing import Any

from lora_converter.run.job import Base, Job
from lora_converter.titans import job
from lora_converter.titans.chat_data import CHAT

NAME = "lora"
"""Of our converter."""

FULL_PHASE_FOLDER = "_full_phase"
"""Added to the names of the folders of phase 1."""


def job_of(job_config: Any) -> Job:
    """The job that a job config describes."""
    model = job_config.model
    return job.job_of(
        job_config,
        dump_folder=job_config.job.dump_folder,
        assets=model.hf_assets_path,
        model=model.name,
        flavor=model.flavor,
        custom_import=job_config.experimental.custom_import,
        data=_data_of(job_config),
        converters=tuple(name for name in model.converters if name != NAME),
    )


def _data_of(job_config: Any) -> dict[str, Any]:
    training = job_config.training
    if training.dataset.lower() == CHAT:
        return {"training.dataset": CHAT}  # the rest is in the fingerprint of its rows
    path = training.dataset_path
    return {
        "training.dataset": training.dataset,
        "training.dataset_path": os.path.realpath(path) if path and os.path.exists(path) else path,
        "training.seq_len": training.seq_len,
        "training.local_batch_size": training.local_batch_size,
        "training.dataloader.num_workers": training.dataloader.num_workers,
        "debug.seed": job_config.debug.seed,
    }


def base_of(job_config: Any) -> Base | None:
    """Where the base comes from: `checkpoint.initial_load_path`, or a Hugging Face `model.hf_assets_path`."""
    return job.base_of(job_config.checkpoint, job_config.model.hf_assets_path)


def full_phase_result(job_config: Any) -> str:
    """The folder of the last checkpoint of phase 1, the base of phase 2."""
    folder = job_config.checkpoint.folder + FULL_PHASE_FOLDER
    return os.path.join(job_config.job.dump_folder, folder, f"step-{job_config.lora.full_phase.steps}")
