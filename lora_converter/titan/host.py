"""torchtitan 0.2.2's trainer as the host of a LoRA run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.stateful import Stateful

from lora_converter.dcp.states import OptimizerState
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.run.description import LR_SCHEDULER, MODEL, OPTIMIZER, TRAIN_STATE
from lora_converter.run.job import Job
from lora_converter.titan.compiling import log_compile_time
from lora_converter.titan.head import skip_logits
from lora_converter.titan.installed import change_trainer
from lora_converter.titan.models import for_names
from lora_converter.titan.optimizer import divide_pipeline_gradients


class TitanHost:
    """A `run.host.Host`, over a trainer that has its model, optimizers and checkpointer's states.

    Args:
        job: Of the converted model.
        model_parts: Of this rank, converted by `LoRAConverter`.
        states: Of torchtitan's checkpointer, which has the trainer itself under `train_state`.
        adapter: The model's StateDictAdapter.
    """

    def __init__(
        self,
        job: Job,
        model_parts: list[nn.Module],
        states: dict[str, Any],
        adapter: StateDictAdapter | None,
    ):
        self.trainer = states[TRAIN_STATE]
        self.job, self.model_parts, self.state_dict_adapter = job, model_parts, adapter
        self.naming: StateDictAdapter | None = for_names(adapter)
        optimizers = states[OPTIMIZER]
        self.optimizers, self.lr_schedulers = list(optimizers.optimizers), list(states[LR_SCHEDULER].schedulers)
        ours: dict[str, Stateful] = {OPTIMIZER: OptimizerState(optimizers.model_parts, optimizers.optimizers)}
        self.states = {name: state for name, state in states.items() if name != MODEL} | ours
        parallel_dims = self.trainer.parallel_dims
        self.meshes = parallel_dims.get_all_one_dimensional_meshes()
        self.adapters_made_in = sum(getattr(part, "lora_made_in", 0.0) for part in model_parts)
        mesh = parallel_dims.get_optional_mesh("loss")  # data x context parallelism
        self.data_rank = mesh.get_local_rank() if mesh is not None else 0

    def prepare_trainer(self, not_spent: int) -> None:
        """Makes the changes to this trainer that every LoRA run needs.

        Args:
            not_spent: FLOPs per token that torchtitan counts too many.
        """
        skip_logits(self.trainer)
        divide_pipeline_gradients(self.trainer)
        log_compile_time(self.trainer)
        change_trainer(self.trainer, "metrics_processor.num_flops_per_token", lambda flops: flops - not_spent)
        if self.trainer.job_config.lora.full_phase.steps > 0:
            log_phase(self.trainer, 2)

    def canonical_name(self, fqn: str) -> str:
        """torchtitan 0.2.2's names are the canonical ones."""
        return fqn

    def on_log(self, look: Callable[[float], None]) -> None:
        """See `Host.on_log`."""

        def looked_at(log: Callable[..., None]) -> Callable[..., None]:
            def log_and_look(step: int, loss: float, max_loss: float, grad_norm: float, **kwargs: Any) -> None:
                look(grad_norm)
                log(step, loss, max_loss, grad_norm, **kwargs)

            return log_and_look

        change_trainer(self.trainer, "metrics_processor.log", looked_at)

    def around_trial_forwards(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """See `Host.around_trial_forwards`."""

        def outside_steps(initialize: Callable[..., Any]) -> Callable[..., Any]:
            def initialize_outside_steps(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return initialize(*args, **kwargs)

            return initialize_outside_steps

        if self.trainer.parallel_dims.pp_enabled:
            change_trainer(self.trainer, "pp_schedule._initialize_pp_stages", outside_steps)

    def end_at(self, step: int) -> None:
        """See `Host.end_at`."""
        self.trainer.step = step

    def end_process(self, exit_code: int) -> NoReturn:
        """See `Host.end_process`."""
        end_process(self.trainer, exit_code)


def end_process(trainer: Any, exit_code: int) -> NoReturn:
    """Closes a trainer and ends the process, as torchtitan does at the end of a run. On all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()  # who ends first takes the others' store along
    trainer.close()
    dist.destroy_process_group()
    raise SystemExit(exit_code)


def log_phase(trainer: Any, number: int) -> None:
    """Adds `lora/phase` to what the trainer logs at each step."""

    def with_phase(log: Callable[..., None]) -> Callable[..., None]:
        def log_with_phase(*args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
            log(*args, extra_metrics={**(extra_metrics or {}), "lora/phase": number}, **kwargs)

        return log_with_phase

    change_trainer(trainer, "metrics_processor.log", with_phase)
