"""What both torchtitans and torch need for CPU ranks, as rows of a table."""

from lora_converter.titans.change import Change

BEFORE_IMPORT = (
    Change(
        "torchtitan.tools.utils:device_type",
        "titans.cpu:prepare",
        "chooses CUDA where torch reports no accelerator, once, when it is imported",
        "torchtitan takes CPU for a device",
    ),
)
"""Made by `cpu.prepare`, process-wide: idempotent and not undone."""

CPU_CHANGES = (
    Change(
        "torchtitan.tools.utils:get_peak_flops",
        "titans.cpu:unknown_peak_flops",
        "falls back to an A100's",
        "the table has CPUs, or says that it does not know",
    ),
    Change(
        "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor",
        "titans.cpu:reduce_with_plain_sums",
        "gloo has no PREMUL_SUM, the reduction that FSDP2 takes once a divide factor is set",
        "gloo has it, or FSDP2 asks",
    ),
    Change(
        "torch.distributed.fsdp:CPUOffloadPolicy.__init__",
        "titans.cpu:offload_without_pinning",
        "pins memory for the copy to an accelerator, which takes one",
        "FSDP2 looks for an accelerator",
    ),
    Change(
        "torch.nn.attention.flex_attention:_validate_device",
        "titans.cpu:let_flex_attention_differentiate",
        "refuses the backward of FlexAttention on CPU, which its uncompiled code has",
        "torch checks compiled code alone",
    ),
)
"""Each host has more of its own."""
