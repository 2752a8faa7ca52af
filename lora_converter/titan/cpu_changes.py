"""What torchtitan and torch need for CPU ranks: rows as those of `host_changes.py`."""

from lora_converter.titan.change import Change

BEFORE_IMPORT = (
    Change(
        "torchtitan.tools.utils:device_type",
        "cpu:prepare",
        "chooses CUDA where torch reports no accelerator, once, when it is imported",
        "torchtitan takes CPU for a device",
    ),
)
"""Made by `cpu.prepare`, process-wide: idempotent and not undone."""

CPU_CHANGES = (
    Change(
        "torchtitan.tools.utils:get_peak_flops",
        "cpu:unknown_peak_flops",
        "falls back to an A100's",
        "the table has CPUs, or says that it does not know",
    ),
    Change(
        "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor",
        "cpu:reduce_with_plain_sums",
        "gloo has no PREMUL_SUM, the reduction that FSDP2 takes once a divide factor is set",
        "gloo has it, or FSDP2 asks",
    ),
    Change(
        "torch.distributed.fsdp:CPUOffloadPolicy.__init__",
        "cpu:offload_without_pinning",
        "pins memory for the copy to an accelerator, which takes one",
        "FSDP2 looks for an accelerator",
    ),
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs",
        "cpu_attention:shard_attention_over_heads",
        "DTensor shards the CUDA attention kernels over batch or heads, but not the CPU one (qwen3 under TP)",
        "DTensor has a rule for the CPU kernel",
    ),
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_to_schema_info",
        "cpu_attention:attention_schemas",
        "the same",
        "the same",
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:custom_ops",
        "cpu_attention:ring_attention",
        "context parallelism has ring versions of the CUDA attention kernels only",
        "torch registers the CPU kernel, too",
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:_create_rotater",
        "cpu_attention:rotate_and_wait",
        "an exchange over gloo beside the attention of the part before corrupts the heap now and then: `malloc(): "
        "unaligned tcache chunk detected`, once in some thousand rings (torch 2.13), without adapters and without us",
        "torch is mended",
    ),
    Change(
        "torch:histc",
        "cpu:histc_of_integers",
        "MoE routing counts expert indices with torch.histc, which has no integer CPU kernel",
        "torch has the kernel",
    ),
    Change(
        "torch.nn.attention.flex_attention:_validate_device",
        "cpu_attention:let_flex_attention_differentiate",
        "refuses the backward of FlexAttention on CPU, which its uncompiled code has",
        "torch checks compiled code alone",
    ),
    Change(
        "torchtitan.models.attention:FlexAttentionWrapper._compiled_flex_attn",
        "cpu_attention:uncompiled_flex_attention",
        "compiled for CPU it has no backward",
        "Inductor has a CPU backward for it",
    ),
    Change(
        "torchtitan.models.attention:_compiled_create_block_mask",
        "cpu_attention:uncompiled_block_mask",
        "compiled anew for each batch of documents, for tens of seconds",
        "the host compiles it on request",
    ),
    Change(
        "torchtitan.distributed.utils:set_determinism",
        "cpu_attention:keep_flex_attention",
        "compiles FlexAttention again with debug.deterministic",
        "the same as FlexAttention's",
    ),
    Change(
        "torchtitan.models.moe.utils:generate_permute_indices",
        "cpu:permute_without_triton",
        "a Triton kernel, with a CPU twin behind a flag",
        "torchtitan sets the flag by the device",
    ),
)
