"""A trainer of torchtitan's as the host of a LoRA run: what is the same in both versions."""

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
from lora_converter.titans.model import lora_model


class TitanHost:
    """A `run.host.Host`, over a trainer that has its model, optimizers and checkpointer's states.

    Args:
        model_parts: Of this rank, with adapters.
        states: Of torchtitan's checkpointer, which has the trainer itself under `train_state`.
        adapter: The model's StateDictAdapter.
        naming: The same, to be asked for the names of single weights.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        states: dict[str, Any],
        adapter: StateDictAdapter | None,
        naming: StateDictAdapter | None,
    ):
        self.trainer = states[TRAIN_STATE]
        self.job: Job = lora_model(model_parts).lora_job
        self.model_parts, self.state_dict_adapter, self.naming = model_parts, adapter, naming
        optimizers = states[OPTIMIZER]
        self.optimizers, self.lr_schedulers = list(optimizers.optimizers), list(states[LR_SCHEDULER].schedulers)
        ours: dict[str, Stateful] = {OPTIMIZER: OptimizerState(optimizers.model_parts, optimizers.optimizers)}
        self.states = {name: state for name, state in states.items() if name != MODEL} | ours
        parallel_dims = self.trainer.parallel_dims
        self.meshes = {n: m for n, m in parallel_dims.get_all_one_dimensional_meshes().items() if m.size() > 1}
        self.adapters_made_in = sum(getattr(part, "lora_made_in", 0.0) for part in model_parts)
        mesh = parallel_dims.get_optional_mesh("loss")  # data x context parallelism
        self.data_rank = mesh.get_local_rank() if mesh is not None else 0

    def canonical_name(self, fqn: str) -> str:
        """See `Host.canonical_name`."""
        raise NotImplementedError

    def change(self, target: str, make: Callable[[Any], Any]) -> None:
        """Replaces an attribute of the trainer, a dotted path: `make` of the old value is the new one."""
        raise NotImplementedError

    def on_log(self, look: Callable[[float], None]) -> None:
        """See `Host.on_log`."""
        self.change("metrics_processor.log", looked_at(look))

    def around_trial_forwards(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """See `Host.around_trial_forwards`."""
        if self.trainer.parallel_dims.pp_enabled:
            self.change("pp_schedule._initialize_pp_stages", outside_steps(context))

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


def outside_steps(
    context: Callable[[], AbstractContextManager[None]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function, made one that is called in `context()`: what a pipeline finds its shapes by."""

    def around(initialize: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_outside_steps(*args: Any, **kwargs: Any) -> Any:
            with context():
                return initialize(*args, **kwargs)

        return initialize_outside_steps

    return around


def looked_at(look: Callable[[float], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A metrics processor's `log`, made one that shows the gradient norm to `look` first."""

    def around(log: Callable[..., None]) -> Callable[..., None]:
        def log_and_look(step: int, loss: float, max_loss: float, grad_norm: float, **kwargs: Any) -> None:
            look(grad_norm)
            log(step, loss, max_loss, grad_norm, **kwargs)

        return log_and_look

    return around
