"""A pipeline stage without its neighbours, for a plan: what they would tell it of their tensors is said in their place.

A stage of a decoder hands on hidden states and takes back their gradient, both as the stage before it does.
"""

from typing import Any

import torch
from torch.distributed.pipelining._utils import (
    InferenceMode,
    _derive_grad_metas,
    _StageBackwardMeta,
    _StageForwardMeta,
    extract_tensor_meta,
)


def leave_alone(trainer: Any) -> None:
    """Lets the schedule of a trainer find its shapes without other ranks. Before its first step."""
    schedule = trainer.pp_schedule
    stages = [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages
    for stage in stages:
        stage.device = trainer.device
        stage._send_meta = lambda meta, stage_index: None
        stage._recv_meta = _Neighbours(trainer, schedule, stage)
    schedule._warmup_p2p = _find_shapes_by_forwards


def _find_shapes_by_forwards(stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
    for stage in stages:
        stage._inference_mode = InferenceMode.DYNAMIC


class _Neighbours:
    """What the stage before and the stage after would send."""

    def __init__(self, trainer: Any, schedule: Any, stage: Any):
        self._trainer, self._stage = trainer, stage
        self._rows = trainer.job_config.training.local_batch_size // schedule._n_microbatches

    def __call__(self, stage_index: int) -> Any:
        if stage_index > self._stage.stage_index:
            return _StageBackwardMeta(_derive_grad_metas(self._stage._stage_meta.outputs))
        dims, training = self._trainer.parallel_dims, self._trainer.job_config.training
        sharded = dims.fsdp_enabled
        dtype = torch.bfloat16 if sharded and training.mixed_precision_param == "bfloat16" else torch.float32
        shape = (self._rows, training.seq_len // dims.cp // dims.tp, self._trainer.model_args.dim)
        return _StageForwardMeta((extract_tensor_meta(torch.empty(shape, dtype=dtype, requires_grad=True)),))
