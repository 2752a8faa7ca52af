"""What torchtitan 0.3 and torch need for CPU ranks: rows as those of 0.2.2's `cpu_changes.py`."""

from lora_converter.titans import cpu, cpu_changes
from lora_converter.titans.change import Change, Installed

CPU_CHANGES = (
    *cpu_changes.CPU_CHANGES,
    Change(
        "torchtitan.models.common.attention:FlexAttention._compiled_flex_attn",
        "titans.cpu:uncompiled_flex_attention",
        "compiled for CPU it has no backward",
        "Inductor has a CPU backward for it",
    ),
    *(
        Change(
            f"torchtitan.models.common.{module}:create_attention_mask",
            "titans.cpu:uncompiled_block_mask",
            "compiled anew for each batch of documents, for tens of seconds",
            "the host compiles it on request",
        )
        for module in ("attention", "decoder")
    ),
    Change(
        "torch.distributed.pipelining.schedules:_batch_p2p",
        "titans.cpu:exchange_memory_as_it_lies",
        "under TP a stage's output is not contiguous, which NCCL sends and gloo refuses, without adapters as well",
        "stages hand on contiguous tensors",
    ),
    Change(
        "torch.distributed:all_to_all",
        "titans.cpu:all_to_all_of_any_sizes",
        "gloo's takes pieces of one size, and spmd_types has it send rows to experts",
        "gloo's takes others",
    ),
)
"""Nothing else is changed in 0.3: its configs take classes of ours."""


def install() -> None:
    """Chooses CPU ranks where there is no accelerator; before torchtitan is imported."""
    if cpu.prepare():
        Installed(CPU_CHANGES)
