"""Rows of a merged model: W + s · B A, with DoRA's scales, some at a time, in fp32 and rounded once."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from lora_converter.hf.base_as import AsPacked
from lora_converter.hf.folder import FLOATS
from lora_converter.hf.magnitudes import row_scales
from lora_converter.hf.merge_keys import MergePlan, Update
from lora_converter.hf.peft_adapter import PeftAdapter, delta_factors
from lora_converter.tensors import is_finite

_ELEMENTS_AT_A_TIME = 2**24


def merged_rows(
    source: Path, key: str, origin: str, plan: MergePlan, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """A weight's rows with their update. Other tensors as they are.

    Args:
        source: The file of the base that has it.
        key: Of the merged model.
        origin: Of the base; another where the plan adds a weight.
        dtype: Of the merged model's floats; each weight's own if None.

    Raises:
        ValueError: The result would hold nan or inf where the base holds none.
    """
    with safe_open(source, framework="pt") as file:  # opened for each tensor: its pages in memory go with it
        weight = file.get_tensor(origin)
    stored = weight.dtype
    weight = plan.replaced.get(key, weight)
    if not weight.numel():
        return
    dtype = dtype if dtype and stored in FLOATS else stored
    update, packed = plan.updates.get(key), plan.packed.get(key)
    for rows, delta in _with_deltas(weight, plan.peft, update, packed):
        rows = rows if delta is None else rows + delta
        result = rows.to(dtype)
        if (update is not None or packed is not None or result.dtype != weight.dtype) and not _stays_finite(
            rows, result
        ):
            raise ValueError(
                f"{key} does not fit into {str(dtype).removeprefix('torch.')}: of {plan.adapter} and {source} it would "
                "hold nan or inf. Nothing is written. "
                + ("Name a wider --dtype, bfloat16 say." if dtype == torch.float16 else "One of the two is damaged.")
            )
        yield result


def _with_deltas(
    weight: torch.Tensor, peft: PeftAdapter, update: Update | None, packed: AsPacked | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Some rows of a weight at a time, of stacked experts one after the other, with s · B A of them, fp32."""
    if update is None and packed is None:
        matrix = weight.reshape(weight.shape[0] if weight.ndim else 1, -1)
        yield from ((rows, None) for rows in matrix.split(max(1, _ELEMENTS_AT_A_TIME // matrix.shape[1])))
        return
    together = packed.rows_together if packed else 1
    size = max(1, _ELEMENTS_AT_A_TIME // weight.shape[-1] // together) * together
    as_trained = packed.unpacked if packed else torch.Tensor.float
    if update is None:
        pieces = (rows for matrix in weight.view(-1, *weight.shape[-2:]) for rows in matrix.split(size))
        yield from ((as_trained(rows), None) for rows in pieces)
        return
    a, b = peft.factors[update.module]
    factor = peft.scaling_of(update.module)
    for matrix, *of_one in zip(*(tensor.view(-1, *tensor.shape[-2:]) for tensor in (weight, a, b)), strict=True):
        left, right = delta_factors(*of_one, transposed=update.transposed)
        some = list(zip(matrix.split(size), left.split(size), strict=True))
        magnitude = peft.magnitudes.get(update.module)
        if magnitude is None:
            yield from ((as_trained(rows), factor * (left_rows @ right)) for rows, left_rows in some)
            continue
        sums = (as_trained(rows) + factor * (left_rows @ right) for rows, left_rows in some)
        scale = row_scales(sums, magnitude, transposed=update.transposed)
        scales = [scale] * len(some) if update.transposed else scale.split(size)
        for (rows, left_rows), own in zip(some, scales, strict=True):
            trained = as_trained(rows)
            yield trained, own * (trained + factor * (left_rows @ right)) - trained


def _stays_finite(rows: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether what is finite is so when it is rounded. A base that holds inf itself, in a mask say, keeps it."""
    if result.dtype not in FLOATS or is_finite(result):  # which takes no mask of its size
        return True
    return bool((result.isfinite() | rows.isinf()).all())
