"""What torchtitan 0.2.2 and torch need for CPU ranks: rows as those of `host_changes.py`."""

from lora_converter.titans import cpu_changes
from lora_converter.titans.change import Change

CPU_CHANGES = (
    *cpu_changes.CPU_CHANGES,
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs",
        "titan.cpu_attention:shard_attention_over_heads",
        "DTensor shards the CUDA attention kernels over batch or heads, but not the CPU one (qwen3 under TP)",
        "DTensor has a rule for the CPU kernel",
    ),
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_to_schema_info",
        "titan.cpu_attention:attention_schemas",
        "the same",
        "the same",
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:custom_ops",
        "titan.cpu_attention:ring_attention",
        "context parallelism has ring versions of the CUDA attention kernels only",
        "torch registers the CPU kernel, too",
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:_create_rotater",
        "titan.cpu_attention:rotate_and_wait",
        "an exchange over gloo beside the attention of the part before corrupts the heap now and then: `malloc(): "
        "unaligned tcache chunk detected`, once in some thousand rings (torch 2.13), without adapters and without us",
        "torch is mended",
    ),
    Change(
        "torch:histc",
        "titans.cpu:histc_of_integers",
        "MoE routing counts expert indices with torch.histc, which has no integer CPU kernel",
        "torch has the kernel",
    ),
    Change(
        "torchtitan.models.attention:FlexAttentionWrapper._compiled_flex_attn",
        "titans.cpu:uncompiled_flex_attention",
        "compiled for CPU it has no backward",
        "Inductor has a CPU backward for it",
    ),
    Change(
        "torchtitan.models.attention:_compiled_create_block_mask",
        "titans.cpu:uncompiled_block_mask",
        "compiled anew for each batch of documents, for tens of seconds",
        "the host compiles it on request",
    ),
    Change(
        "torchtitan.distributed.utils:set_determinism",
        "titan.cpu_attention:keep_flex_attention",
        "compiles FlexAttention again with debug.deterministic",
        "the same as FlexAttention's",
    ),
    Change(
        "torchtitan.models.moe.utils:generate_permute_indices",
        "titan.cpu_attention:permute_without_triton",
        "a Triton kernel, with a CPU twin behind a flag",
        "torchtitan sets the flag by the device",
    ),
)
"""Undone together with the host's own."""
