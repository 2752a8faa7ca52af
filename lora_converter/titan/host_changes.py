"""Everything that is changed in the host and in torch for its sake, as tables; `cpu_changes.py` has CPU ranks' rows.

Each row names an attribute, what makes the new value of the old one, why, and when the row can go. `installed.py`
applies the rows together and undoes them together. Nothing here imports the host.
"""

from lora_converter.titans.change import Change

CHANGES = (
    Change(
        "torchtitan.components.checkpoint:CheckpointManager.__init__",
        "titan.checkpoint:choose_manager",
        "no setting names the checkpointer's class, and the trainer finds it in its own module, `__main__` for one",
        "TrainSpec can name a checkpointer",
    ),
    Change(
        "torchtitan.distributed.utils:clip_grad_norm_",
        "titan.optimizer:clip_complete_gradients",
        "gradients of factors that tensor parallelism keeps whole are partial sums; a frozen stage has no gradient",
        "the trainer has a hook before clipping, and clips what has no gradient",
    ),
    Change(
        "torchtitan.components.optimizer:OptimizersContainer.__init__",
        "titan.optimizer:accept_frozen_stages",
        "a pipeline stage without adapters has no parameter to optimise",
        "OptimizersContainer accepts a stage that is frozen",
    ),
    Change(
        "torchtitan.components.optimizer:OptimizersContainer._post_init",
        "titan.optimizer:accept_frozen_models",
        "the same",
        "the same",
    ),
    Change(
        "torchtitan.config:JobConfig.maybe_log",
        "titan.checks:compare_before_logging",
        "ranks with different settings wait for each other in vain; this is the first call after the process group "
        "is there, before the seed is shared and before any mesh",
        "torchtitan compares job configs itself",
    ),
    Change(
        "torchtitan.protocols.train_spec:get_train_spec",
        "titan.new_tokens:with_new_tokens",
        "a spec's tokenizer is built from its folder alone, without lora.new_tokens; inside chat's, whose copy changes",
        "a job can name tokens to add",
    ),
    Change(
        "torchtitan.protocols.train_spec:get_train_spec",
        "titan.chat:offer_chat",
        'datasets are text without a mask; a spec that takes training.dataset = "chat" is one that this returns',
        "a dataset can bring its loader, masks and validator",
    ),
    Change(
        "torchtitan.config:ConfigManager.parse_args",
        "titan.phases:read_the_command_line_late",
        "binds the command line when it is imported, and phase 2 of a job has options of its own",
        "torchtitan's main takes arguments",
    ),
    Change(
        "torch.utils.checkpoint:create_selective_checkpoint_contexts",
        "titans.selective_ac:count_as_products",
        "op-SAC knows matrix products, and not the operator of an adapted linear",
        "torchtitan's policy can be told of operators that are products",
    ),
    Change(
        "torchtitan.distributed.activation_checkpoint:_apply_op_sac",
        "titans.selective_ac:shapes_of_packed",
        "takes the shape of a linear's product from its weight, which a packed one's is not",
        "no weight's shape is read",
    ),
    Change(
        "torchtitan.distributed.expert_parallel:distribute_module",
        "titan.expert_plans:place_packed",
        "its plans for experts make parameters that require gradients, which bytes cannot",
        "the plans keep requires_grad",
    ),
    Change(
        "torchtitan.models.llama4.infra.parallelize:fully_shard",
        "titan.tied:shard_tied_together",
        "qwen3 puts a tied embedding and head into two FSDP2 groups, which torch 2.13 refuses",
        "they are in one group, as in torchtitan 0.3",
    ),
    Change(
        "torchtitan.components.validate:Validator.validate",
        "titan.head:validate_without_logits",
        "takes logits where a frozen head's loss needs none",
        "the host's loss takes hidden states and the head",
    ),
    Change(
        "torchtitan.models.attention:FlexAttentionWrapper.forward",
        "titan.documents:on_local_heads",
        "qwen3 hands it DTensors under tensor parallelism, which cannot index a mask's own tensors",
        "FlexAttention takes DTensors with any mask",
    ),
)
"""Undone together, in reverse."""

TRAINER_CHANGES = (
    Change(
        "metrics_processor.log",
        "titan.host:TitanHost.on_log",
        "nothing else tells the gradient norm; metrics of ours are added there",
        "the trainer has a hook on logging",
    ),
    Change(
        "metrics_processor.num_flops_per_token",
        "titans.flops:flops_not_spent",
        "counts 6 FLOPs per parameter, frozen or not",
        "get_nparams_and_flops looks at requires_grad",
    ),
    Change(
        "loss_fn",
        "titan.head:skip_logits",
        "is handed logits, [tokens, vocabulary], that a frozen head's loss does not need",
        "the host's loss takes hidden states and the head",
    ),
    Change("pp_schedule._loss_fn", "titan.head:skip_logits", "the same", "the same"),
    Change("forward_backward_step", "titan.head:skip_logits", "the same", "the same"),
    Change(
        "forward_backward_step",
        "titan.optimizer:divide_pipeline_gradients",
        "under PP the division by the token count reaches the logged loss and not the gradients",
        "the schedule gets the divided loss",
    ),
    Change(
        "train_step",
        "titans.compiling:first_step_told",
        "torch compiles in the first step, and nothing says how long that took",
        "the trainer logs it",
    ),
    Change(
        "pp_schedule._initialize_pp_stages",
        "titan.host:TitanHost.around_trial_forwards",
        "a pipeline finds its shapes by a forward whose generator is put back: the step's seed would be lost with it",
        "shapes are found without a forward",
    ),
    Change(
        "checkpointer.save",
        "titan.phases:run_full_phase",
        "a signal ends phase 1, too, after a step that is saved for it",
        "the trainer saves and ends on SIGTERM",
    ),
)
"""Made by `change_trainer` to one trainer, for a run of ours, and gone with it."""
