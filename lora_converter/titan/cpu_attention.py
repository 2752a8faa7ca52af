"""Attention on CPU ranks: sharding rules and the ring of context parallelism for its kernel; and experts' rows.

The functions make the values of rows of `cpu_changes.py`, which say why.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def shard_attention_over_heads(strategies: dict) -> dict:
    """DTensor's rules, with one for the CPU attention kernel."""
    return _with_attention()[0]


def attention_schemas(schemas: dict) -> dict:
    """The table beside them."""
    return _with_attention()[1]


def _with_attention() -> list[dict]:
    """Copies of DTensor's tables with what `register_sharding` puts there; the tables stay as they were."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def like_the_query(outputs: int, tensors: int) -> Callable[..., Any]:
        def shardings(*args: Any, **kwargs: Any) -> list[tuple[list, list]]:
            rest = [None] * (len(args) - tensors)
            return [([p] * outputs, [p] * tensors + rest) for p in (Replicate(), Shard(0), Shard(1))]

        return shardings

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables: list[dict] = [propagator.op_strategy_funcs, propagator.op_to_schema_info]
    before = [dict(table) for table in tables]
    forward_op, backward_op = _attention_ops()
    register_sharding(forward_op)(like_the_query(2, 3))
    register_sharding(backward_op)(like_the_query(3, 6))
    after = [dict(table) for table in tables]
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    return after


def _attention_ops() -> tuple[Any, Any]:
    """The CPU attention kernel and its backward."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    )


def ring_attention(custom_ops: dict) -> dict:
    """Handlers of context parallelism: the ring itself fits the CPU kernel."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    def as_dtensors(results: tuple[torch.Tensor, ...], like: DTensor) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(r, like.device_mesh, like.placements, run_check=False) for r in results)

    def forward(op: Any, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
        (query, key, value, *rest), options = args, dict(kwargs)
        options.update(zip(("dropout_p", "is_causal"), rest, strict=False))
        results = cp._templated_ring_attention(
            query.device_mesh.get_group(), 2, op, *(t.to_local() for t in (query, key, value)), **options
        )
        return as_dtensors(results, query)

    def backward(op: Any, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
        grad_out, query, key, value, out, logsumexp, dropout_p, is_causal = args
        local = {
            name: tensor.to_local()
            for name, tensor in dict(
                grad_out=grad_out, query=query, key=key, value=value, out=out, logsumexp=logsumexp
            ).items()
        }
        results = cp._templated_ring_attention_backward(
            query.device_mesh.get_group(),
            2,
            op,
            grad_out_name="grad_out",
            dropout_p=dropout_p,
            is_causal=is_causal,
            **local,
            **kwargs,
        )
        return as_dtensors(results, query)

    forward_op, backward_op = _attention_ops()
    return {**custom_ops, forward_op: forward, backward_op: backward}


def rotate_and_wait(create_rotater: Callable[..., Any]) -> Callable[..., Any]:
    """`_create_rotater`, whose rotaters have received what they exchange before anything else is done."""

    @functools.wraps(create_rotater)
    def create_patient(*args: Any, **kwargs: Any) -> Any:
        rotater = create_rotater(*args, **kwargs)
        exchange = rotater.exchange_buffers

        def exchange_and_wait(buffer: torch.Tensor) -> None:
            exchange(buffer)
            rotater.next_buffer()

        rotater.exchange_buffers = exchange_and_wait
        return rotater

    return create_patient


def keep_flex_attention(set_determinism: Callable[..., None]) -> Callable[..., None]:
    """`set_determinism`, after which FlexAttention is what it was."""
    from torchtitan.models.attention import FlexAttentionWrapper

    @functools.wraps(set_determinism)
    def set_determinism_alone(*args: Any, **kwargs: Any) -> None:
        before = FlexAttentionWrapper._compiled_flex_attn
        set_determinism(*args, **kwargs)
        FlexAttentionWrapper._compiled_flex_attn = before

    return set_determinism_alone


def permute_without_triton(generate_permute_indices: Callable[..., Any]) -> Callable[..., Any]:
    """The permutation's CPU twin."""
    return functools.partial(generate_permute_indices, use_cpu=True)
