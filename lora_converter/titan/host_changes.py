"""Everything that is changed in the host and in torch for its sake, as one table.

Each row names an attribute, what makes the new value of the old one, why, and when the row can go. `installed.py`
applies the rows together and undoes them together. Nothing here imports the host.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One attribute of the host's.

    Attributes:
        target: `module:path.to.attribute`; of a trainer, the path alone.
        make: `module:function` below this package: the old value -> the new one.
        reason: Why the host's own will not do.
        until: When the row can go.
        only_on_cpu: The row is for machines without an accelerator.
    """

    target: str
    make: str
    reason: str
    until: str
    only_on_cpu: bool = False

    def owner(self) -> tuple[Any, str]:
        """The object that has the attribute, and the attribute's name."""
        module, _, path = self.target.partition(":")
        *parts, name = path.split(".")
        return functools.reduce(getattr, parts, importlib.import_module(module)), name

    def new_value(self, old: Any) -> Any:
        """What takes the place of `old`."""
        module, _, function = self.make.partition(":")
        return getattr(importlib.import_module(f"lora_converter.titan.{module}"), function)(old)


BEFORE_IMPORT = (
    Change(
        "torchtitan.tools.utils:device_type",
        "cpu:prepare",
        "chooses CUDA where torch reports no accelerator, once, when it is imported",
        "torchtitan takes CPU for a device",
        only_on_cpu=True,
    ),
)
"""Made by `cpu.prepare`, process-wide: idempotent and not undone."""

CHANGES = (
    Change(
        "torchtitan.components.checkpoint:CheckpointManager.__init__",
        "checkpoint:choose_manager",
        "no setting names the checkpointer's class, and the trainer finds it in its own module, `__main__` for one",
        "TrainSpec can name a checkpointer",
    ),
    Change(
        "torchtitan.distributed.utils:clip_grad_norm_",
        "optimizer:clip_complete_gradients",
        "gradients of factors that tensor parallelism keeps whole are partial sums; a frozen stage has no gradient",
        "the trainer has a hook before clipping, and clips what has no gradient",
    ),
    Change(
        "torchtitan.components.optimizer:OptimizersContainer.__init__",
        "optimizer:accept_frozen_stages",
        "a pipeline stage without adapters has no parameter to optimise",
        "OptimizersContainer accepts a stage that is frozen",
    ),
    Change(
        "torchtitan.components.optimizer:OptimizersContainer._post_init",
        "optimizer:accept_frozen_models",
        "the same",
        "the same",
    ),
    Change(
        "torchtitan.config:JobConfig.maybe_log",
        "checks:compare_before_logging",
        "ranks with different settings wait for each other in vain; this is the first call after the process group "
        "is there, before the seed is shared and before any mesh",
        "torchtitan compares job configs itself",
    ),
    Change(
        "torchtitan.protocols.train_spec:get_train_spec",
        "chat:offer_chat",
        'datasets are text without a mask; a spec that takes training.dataset = "chat" is one that this returns',
        "a dataset can bring its loader, masks and validator",
    ),
    Change(
        "torchtitan.config:ConfigManager.parse_args",
        "phases:read_the_command_line_late",
        "binds the command line when it is imported, and phase 2 of a job has options of its own",
        "torchtitan's main takes arguments",
    ),
    Change(
        "torch.utils.checkpoint:create_selective_checkpoint_contexts",
        "selective_ac:count_as_products",
        "op-SAC knows matrix products, and not the operator of an adapted linear",
        "torchtitan's policy can be told of operators that are products",
    ),
    Change(
        "torchtitan.components.validate:Validator.validate",
        "head:validate_without_logits",
        "takes logits where a frozen head's loss needs none",
        "the host's loss takes hidden states and the head",
    ),
    Change(
        "torchtitan.tools.utils:get_peak_flops",
        "cpu:unknown_peak_flops",
        "falls back to an A100's",
        "the table has CPUs, or says that it does not know",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor",
        "cpu:reduce_with_plain_sums",
        "gloo has no PREMUL_SUM, the reduction that FSDP2 takes once a divide factor is set",
        "gloo has it, or FSDP2 asks",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.fsdp:CPUOffloadPolicy.__init__",
        "cpu:offload_without_pinning",
        "pins memory for the copy to an accelerator, which takes one",
        "FSDP2 looks for an accelerator",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs",
        "cpu_attention:shard_attention_over_heads",
        "DTensor shards the CUDA attention kernels over batch or heads, but not the CPU one (qwen3 under TP)",
        "DTensor has a rule for the CPU kernel",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.tensor:DTensor._op_dispatcher.sharding_propagator.op_to_schema_info",
        "cpu_attention:attention_schemas",
        "the same",
        "the same",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:custom_ops",
        "cpu_attention:ring_attention",
        "context parallelism has ring versions of the CUDA attention kernels only",
        "torch registers the CPU kernel, too",
        only_on_cpu=True,
    ),
    Change(
        "torch.distributed.tensor.experimental._context_parallel._attention:_create_rotater",
        "cpu_attention:rotate_and_wait",
        "an exchange over gloo beside the attention of the part before corrupts the heap now and then: `malloc(): "
        "unaligned tcache chunk detected`, once in some thousand rings (torch 2.13), without adapters and without us",
        "torch is mended",
        only_on_cpu=True,
    ),
    Change(
        "torch:histc",
        "cpu:histc_of_integers",
        "MoE routing counts expert indices with torch.histc, which has no integer CPU kernel",
        "torch has the kernel",
        only_on_cpu=True,
    ),
    Change(
        "torchtitan.models.attention:FlexAttentionWrapper.forward",
        "documents:on_local_heads",
        "qwen3 hands it DTensors under tensor parallelism, which cannot index a mask's own tensors",
        "FlexAttention takes DTensors with any mask",
    ),
    Change(
        "torch.nn.attention.flex_attention:_validate_device",
        "cpu_attention:let_flex_attention_differentiate",
        "refuses the backward of FlexAttention on CPU, which its uncompiled code has",
        "torch checks compiled code alone",
        only_on_cpu=True,
    ),
    Change(
        "torchtitan.models.attention:FlexAttentionWrapper._compiled_flex_attn",
        "cpu_attention:uncompiled_flex_attention",
        "compiled for CPU it has no backward",
        "Inductor has a CPU backward for it",
        only_on_cpu=True,
    ),
    Change(
        "torchtitan.models.attention:_compiled_create_block_mask",
        "cpu_attention:uncompiled_block_mask",
        "compiled anew for each batch of documents, for tens of seconds",
        "the host compiles it on request",
        only_on_cpu=True,
    ),
    Change(
        "torchtitan.distributed.utils:set_determinism",
        "cpu_attention:keep_flex_attention",
        "compiles FlexAttention again with debug.deterministic",
        "the same as FlexAttention's",
        only_on_cpu=True,
    ),
    Change(
        "torchtitan.models.moe.utils:generate_permute_indices",
        "cpu:permute_without_triton",
        "a Triton kernel, with a CPU twin behind a flag",
        "torchtitan sets the flag by the device",
        only_on_cpu=True,
    ),
)
"""Undone together, in reverse."""

TRAINER_CHANGES = (
    Change(
        "metrics_processor.log",
        "host:TitanHost.on_log",
        "nothing else tells the gradient norm; metrics of ours are added there",
        "the trainer has a hook on logging",
    ),
    Change(
        "metrics_processor.num_flops_per_token",
        "flops:flops_not_spent",
        "counts 6 FLOPs per parameter, frozen or not",
        "get_nparams_and_flops looks at requires_grad",
    ),
    Change(
        "loss_fn",
        "head:skip_logits",
        "is handed logits, [tokens, vocabulary], that a frozen head's loss does not need",
        "the host's loss takes hidden states and the head",
    ),
    Change("pp_schedule._loss_fn", "head:skip_logits", "the same", "the same"),
    Change("forward_backward_step", "head:skip_logits", "the same", "the same"),
    Change(
        "forward_backward_step",
        "optimizer:divide_pipeline_gradients",
        "under PP the division by the token count reaches the logged loss and not the gradients",
        "the schedule gets the divided loss",
    ),
    Change(
        "pp_schedule._initialize_pp_stages",
        "host:TitanHost.around_trial_forwards",
        "a pipeline finds its shapes by a forward whose generator is put back: the step's seed would be lost with it",
        "shapes are found without a forward",
    ),
    Change(
        "checkpointer.save",
        "phases:run_full_phase",
        "a signal ends phase 1, too, after a step that is saved for it",
        "the trainer saves and ends on SIGTERM",
    ),
)
"""Made by `change_trainer` to one trainer, for a run of ours, and gone with it."""
