"""A run that goes on takes the rates that its job says now, and not those of the job that wrote the step.

torch stores an optimizer's hyperparameters with its state, and a schedule's base rates with its position. What a step
restores is the state and the position: the schedule goes on at its step, on the job's own base rate.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_SAID = {
    "initial_lr": "optimizer.lr",
    "betas": "optimizer.beta1, beta2",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
}
"""Options whose change is worth a line, and their names in a job. Others choose an implementation."""

_RATE_OF_TRAINED = "learning rate of lora.train_also"


class Hyperparameters:
    """What a job says of its optimizers, to be put back after a step is loaded.

    Args:
        optimizers: As they were built.
        schedulers: Of their learning rates, one for each or none.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]):
        self._optimizers, self._schedulers = optimizers, schedulers
        self._configured = [[_options(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def put_back(self) -> list[str]:
        """Makes them the job's again.

        Returns:
            What was another in the step, a phrase each.
        """
        changes: dict[str, None] = {}
        for optimizer, configured in zip(self._optimizers, self._configured, strict=True):
            for number, (group, options) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
                said = _SAID if number == 0 else {**_SAID, "initial_lr": _RATE_OF_TRAINED}
                for name, value in options.items():
                    if name in said and group.get(name, value) != value:
                        changes[f"{said[name]} {_shown(group[name])} -> {_shown(value)}"] = None
                    group[name] = value
        for scheduler in self._schedulers:
            _continue(scheduler)
        return list(changes)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options but for the rate of the moment, which is the schedule's."""
    own = {name: value for name, value in group.items() if name not in ("params", "lr")}
    return own if "initial_lr" in own else {**own, "lr": group["lr"]}


def _continue(scheduler: LRScheduler) -> None:
    """The rate of the moment, from the base rates of now and the schedule's position."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    lambdas: Iterable[Any] = getattr(scheduler, "lr_lambdas", ())
    for group, base, factor in zip(groups, scheduler.base_lrs, lambdas, strict=False):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def _shown(value: Any) -> str:
    return ", ".join(f"{number:g}" for number in (value if isinstance(value, tuple | list) else (value,)))
