"""Index tensors that are given to a StateDictAdapter instead of weights, and what comes back read off.

No index tensor takes more memory than the dim that it counts through, however large the weight: it repeats its numbers
along the others without memory (stride 0), and copies and concatenations stay so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def ask(adapter: Any, probes: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """What a StateDictAdapter makes of index tensors.

    Args:
        what: The weights that they stand for, for messages.

    Raises:
        ValueError: It fails.
    """
    try:
        try:
            with _CompactCopies():
                return adapter.to_hf(dict(probes))
        except RuntimeError:  # it views a copy in a way that only memory of its own allows
            return adapter.to_hf(dict(probes))
    except Exception as e:
        raise ValueError(f"{what}: {type(adapter).__name__} cannot express it in Hugging Face's terms ({e!r}).") from e


def count(size: int) -> torch.Tensor:
    """0, 1, ..., size - 1."""
    return torch.arange(size, dtype=torch.int32)


def along(numbers: torch.Tensor, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a shape that has everywhere its index in one dim. It takes the memory of `numbers`."""
    return numbers.view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)


def line_of(numbers: torch.Tensor) -> tuple[int | None, torch.Tensor] | None:
    """The dim along which numbers differ, and them; no dim if all are one number; None if they differ otherwise."""
    core = _compact(numbers)
    if core.dtype != torch.int32 or not core.numel():  # what computes with them does more than reorder
        return None
    dims = [dim for dim, size in enumerate(core.shape) if size > 1]
    for dim in dims:
        line = core.movedim(dim, 0).reshape(core.shape[dim], -1)[:, 0]
        if not bool((line == line[0]).all()):
            same = len(dims) == 1 or bool((core == line.view(-1, *[1] * (core.ndim - dim - 1))).all())
            return (dim, line) if same else None
    one = core.flatten()[:1]
    return (None, one) if not dims or bool((core == one).all()) else None


def select(numbers: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    """`index_select`, whose result repeats what `numbers` repeats."""
    core = _compact(numbers)
    chosen = core if numbers.stride(dim) == 0 else core.index_select(dim, indices)
    return chosen.expand([len(indices) if d == dim else size for d, size in enumerate(numbers.shape)])


def _compact(numbers: torch.Tensor) -> torch.Tensor:
    """The same without the repetitions that take no memory: 1 along each dim of stride 0."""
    return numbers[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in numbers.stride())]


def _compact_cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Their concatenation, without the repetitions that they have in common."""
    first, size = tensors[0], sum(tensor.shape[dim] for tensor in tensors)
    whole = [size if d == dim % first.ndim else length for d, length in enumerate(first.shape)]
    repeats = [all(tensor.stride(d) == 0 for tensor in tensors) for d in range(first.ndim)]
    cores = [tensor[tuple(slice(0, 1) if every else slice(None) for every in repeats)] for tensor in tensors]
    if repeats[dim] and all(torch.equal(core, cores[0]) for core in cores):
        return cores[0].expand(whole)
    repeats[dim] = False
    cores = [tensor[tuple(slice(0, 1) if every else slice(None) for every in repeats)] for tensor in tensors]
    return torch.cat(cores, dim).expand(whole)


class _CompactCopies(TorchDispatchMode):
    """Copies of expanded tensors stay expanded: an index tensor of a weight of GiB is a list of numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            copy = _compact(args[0]).clone(memory_format=torch.contiguous_format)
            return copy.expand(args[0].shape)
        if func is torch.ops.aten.cat.default:
            return _compact_cat(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To skip it would import it, which takes seconds."""
        return False
