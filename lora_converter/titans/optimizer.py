"""What `train_also` names, and rows of tokens, train in a second group: a rate of their own, no weight decay."""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from lora_converter.new_tokens import trained_beside


def check_one_group(patterns: Sequence[str]) -> None:
    """Refuses groups of a user's own.

    Args:
        patterns: Of parameters' names, one for each group.

    Raises:
        ValueError: There are several.
    """
    if len(patterns) > 1:
        raise ValueError(
            f"optimizer.param_groups: {list(patterns)} are of all weights, and adapters train in one group. Leave one, "
            "of pattern '.*'; lora.train_also_lr is the rate of what trains beside adapters."
        )


def split_group(model_parts: Sequence[nn.Module], group: dict[str, Any]) -> list[dict[str, Any]]:
    """An optimizer's group as one of adapters and one of what trains beside them, of a job that has such.

    Args:
        model_parts: Of this rank. Both groups are on every stage, since the schedules of all are stored as one.
        group: `params` of one of them, `param_names` if the host has such, and options.
    """
    job: Any = next((part.lora_job for part in model_parts if hasattr(part, "lora_job")), None)
    if job is None or not (job.config.train_also or job.tokens):
        return [group]
    beside = {id(param) for part in model_parts for param in trained_beside(part).values()}
    rate: dict[str, Any] = {"lr": job.config.train_also_lr or group["lr"], "weight_decay": 0.0}
    lists = [name for name in ("params", "param_names") if name in group]
    where = [id(param) in beside for param in group["params"]]

    def those(are_beside: bool) -> dict[str, Any]:
        return {n: [one for one, is_one in zip(group[n], where, strict=True) if is_one == are_beside] for n in lists}

    return [{**group, **those(False)}, {**group, **those(True), **rate}]
