"""Cross-entropy over a frozen head whose logits never exist as a whole.

A head that is not trained owes the backward one thing, the gradient of its input. A chunk of tokens has that in the
forward already: its logits give its loss and, by a second product, its gradient, and go. What is kept is as large as
the hidden states, the backward scales it, and the products are two, as with logits. Tokens without a label are left
out of both.

Under tensor parallelism each rank has some rows of the head, and with them some columns of the logits: a row's
maximum, its sum and its label's logit are reduced, two small collectives a chunk, and each rank's gradient is its
part of a sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORED = -100
"""The label of a token without one, as everywhere in PyTorch."""

CHUNK_BYTES = 768 * 2**20
"""What a chunk's logits may take by default."""


def default_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits fit `CHUNK_BYTES`, 6 bytes each: once in the compute dtype, once in fp32.

    Args:
        vocabulary: Rows of the head that this rank has.
    """
    return max(CHUNK_BYTES // (6 * vocabulary) // 128 * 128, 128)


def frozen_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_tokens: int,
    first_row: int = 0,
    group: dist.ProcessGroup | None = None,
    compile_backend: str = "",
    added: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of the cross-entropies of `labels`, as of `F.cross_entropy(F.linear(hidden, weight, bias).float(), ...)`.

    Differentiable in `hidden` and `added` alone, once.

    Args:
        hidden: [..., width]; its dtype, or that of autocast, is the products'. The same on all ranks of `group`.
        weight: [vocabulary, width]; with `group`, the rows of this rank.
        labels: [...], int64; `IGNORED` for none.
        bias: [vocabulary], as `weight`.
        chunk_tokens: Rows of logits that are there at a time, at most; above 0.
        first_row: The label of `weight`'s first row.
        group: Ranks that hold the other rows; the gradient of `hidden` is then this rank's part of a sum.
        added: [rows, width], what is added to the rows of `weight` that `columns`, [rows], names: these train.
        compile_backend: That of torch.compile for what is done to a chunk's logits; empty for eager. Not with `group`.

    Returns:
        [], fp32. The same on all ranks of `group`.

    Raises:
        ValueError: Not every token has a label.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"Labels of shape {tuple(labels.shape)} for hidden states of shape {tuple(hidden.shape)}.")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden = hidden.to(dtype).flatten(0, -2)
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if group is not None:
        softmax: _Softmax = functools.partial(_softmax, first_row=first_row, group=group)
    else:
        softmax = _compiled_softmax(compile_backend) if compile_backend else _softmax
    return _FrozenHeadLoss.apply(hidden, weight, bias, labels.flatten(), chunk_tokens, softmax, added, columns)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
        softmax: "_Softmax",
        added: torch.Tensor | None,
        columns: torch.Tensor | None,
    ) -> torch.Tensor:
        some, of_added = (None, None) if added is None else (added.to(hidden.dtype), added.new_zeros(added.shape))
        rows = (labels != IGNORED).nonzero().squeeze(1)
        gradients: list[torch.Tensor] = []

        def take(part: torch.Tensor) -> torch.Tensor:  # its logits are gone at the end
            x = hidden[part]
            logits = F.linear(x, weight, bias)
            if some is not None and columns is not None:
                logits.index_add_(1, columns, F.linear(x, some))
            loss, of_logits = softmax(logits, labels[part].unsqueeze(1))
            if ctx.needs_input_grad[0]:
                gradients.append(of_logits @ weight)
            if some is not None and columns is not None and of_added is not None and any(ctx.needs_input_grad):
                own = of_logits.index_select(1, columns)
                of_added.add_(own.mT @ x)
                if ctx.needs_input_grad[0]:
                    gradients[-1].addmm_(own, some)
            return loss

        loss = hidden.new_zeros((), dtype=torch.float32)
        chunks = -(-rows.numel() // chunk_tokens)
        for part in rows.tensor_split(chunks) if chunks else ():
            loss += take(part)
        ctx.save_for_backward(rows, of_added, *gradients)
        ctx.like = dict(size=hidden.shape, dtype=hidden.dtype, device=hidden.device)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, of_added, *gradients = ctx.saved_tensors
        # A token without a label has a zero whatever the scale is: 1 / 0 where no rank has a label.
        whole = torch.zeros(**ctx.like)
        for part, gradient in zip(rows.tensor_split(len(gradients) or 1), gradients, strict=False):
            # One element, not a scalar: the product is then taken in fp32, and 1 / tokens keeps its digits.
            whole.index_copy_(0, part, (gradient * scale.reshape(1)).to(gradient.dtype))
        return whole, None, None, None, None, None, None if of_added is None else of_added * scale, None


_Softmax = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Logits [tokens, vocabulary] and labels [tokens, 1] -> the sum of losses and the logits' gradient, in their place."""


def _softmax(
    logits: torch.Tensor, labels: torch.Tensor, *, first_row: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    values, rows = logits.float(), logits.shape[1]
    column = labels - first_row
    here = (column >= 0) & (column < rows)
    if group is not None:  # else a label that no row has is an error of `gather`
        column = column.clamp(0, rows - 1)
    largest = values.amax(1, keepdim=True)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    values -= largest
    own = values.gather(1, column)
    values.exp_()
    sums = torch.cat([values.sum(1, keepdim=True), torch.where(here, own, 0.0)], 1)
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, label = sums.split(1, 1)
    values /= total
    if torch.compiler.is_compiling():  # fused: nothing of the size of the logits is written but their gradient
        values = values - (torch.arange(rows, device=logits.device) == column).float()
    else:
        values.scatter_(1, column, values.gather(1, column) - here.float())
    logits.copy_(values)
    return (total.log() - label).sum(), logits


@functools.cache
def _compiled_softmax(backend: str) -> "_Softmax":
    return torch.compile(_softmax, backend=backend, dynamic=True)
