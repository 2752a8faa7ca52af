"""One training run under every layout: what each row of the parity table does, on one rank or many.

Ten steps of AdamW on one global batch per step, B away from zero so that every adapter has a gradient, clipping on.
The optimizer's eps is 1e-5: Adam's first steps are g / (|g| + eps), which turns the rounding of a gradient near zero,
here 1e-9 and less, into a step of full size unless eps stands well above it.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import ROOT, Run, adapter_state, build, finish
from launch import main
from qat_converter import WEIGHTS_ALONE
from tiny_models import base_options

from lora_converter.adapted import adapter_parameters
from lora_converter.names import stable_hash
from lora_converter.packed_module import packed_formats
from lora_converter.tensors import copy_full_, full_tensor
from lora_converter.titan import optimizer

STEPS, ROWS, TOKENS = 10, 8, 64

TP2 = ["--parallelism.tensor_parallel_degree=2"]
PP2 = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=2"]
CP2 = ["--parallelism.context_parallel_degree=2"]
FSDP2 = ["--parallelism.data_parallel_shard_degree=2"]
FSDP4 = ["--parallelism.data_parallel_shard_degree=4"]
FSDP8 = ["--parallelism.data_parallel_shard_degree=8"]
EP2 = ["--parallelism.expert_parallel_degree=2"]
EP4 = ["--parallelism.expert_parallel_degree=4"]
ETP2 = ["--parallelism.expert_tensor_parallel_degree=2"]
INTERLEAVED = ["--parallelism.pipeline_parallel_schedule=Interleaved1F1B"]
REPLICATE2 = ["--parallelism.data_parallel_replicate_degree=2"]
DDP2 = [*REPLICATE2, "--parallelism.data_parallel_shard_degree=1"]
COMPILE = ["--compile.enable", "--compile.components=model"]
FULL_AC = ["--activation_checkpoint.mode=full"]
OP_SAC = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
LAYER_SAC = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"]
OVER_LOGITS = ("--lora.loss_chunk_tokens=0",)
VALIDATION = ["--validation.enable", "--validation.freq=3", "--validation.steps=2", "--validation.seq_len=64",
              "--validation.dataset=c4_test", f"--validation.dataset_path={ROOT}/tests/assets/c4_test"]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A layout, compared with one rank that runs the same job on the same model."""

    ranks: int
    layout: tuple[str, ...] = ()
    model: str = "llama3"
    job: tuple[str, ...] = ()
    """Options that one rank has too, since they change the numbers."""

    microbatches: int = 1
    """Gradient accumulation; one rank takes the whole batch at once."""

    rounding: float = 1.0
    """Factor on the bounds: of gradients whose parts are rounded to bf16 before they are added up."""

    @property
    def degree(self) -> int:
        """Of data parallelism."""
        degree = 1
        for option in self.layout:
            name, _, value = option.partition("=")
            if name in ("--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"):
                degree *= int(value)
        return degree

    @property
    def one_rank(self) -> "Row":
        """With torchtitan's own loss."""
        return Row(1, OVER_LOGITS, model=self.model, job=self.job)

    @property
    def key(self) -> str:
        """A file name for the run of one rank."""
        key = "".join(c if c.isalnum() else "-" for c in "_".join([self.model, *self.job]))
        return key if len(key) < 150 else f"{key[:100]}-{stable_hash(key)}"


def row(ranks: int, *layout: list[str], **fields: Any) -> Row:
    return Row(ranks, tuple(itertools.chain(*layout)), **fields)


TABLE = {
    "FSDP2": row(2, FSDP2),
    "DDP2": row(2, DDP2),
    "TP2": row(2, TP2),
    "PP2 1F1B": row(2, PP2),
    "PP2 interleaved": row(2, PP2, INTERLEAVED),
    "CP2": row(2, CP2),
    "HSDP 2x2": row(4, REPLICATE2, FSDP2),
    "TP2 x FSDP2": row(4, TP2, FSDP2),
    "CP2 x TP2": row(4, CP2, TP2),
    "PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2),
    "PP2 x CP2 x FSDP2": row(8, PP2, CP2, FSDP2),
    "MoE, FSDP2": row(2, FSDP2, model="deepseek_v3"),
    "MoE, EP2": row(2, FSDP2, EP2, model="deepseek_v3"),
    "MoE, EP2 x TP2": row(4, FSDP2, EP2, TP2, ETP2, model="deepseek_v3"),
}
"""The rows of the table in docs/parallelism.md."""

DROPOUT = ("--lora.dropout=0.2",)
PATTERNS = ("--lora.rank_pattern", "wq", "3", "layers.1.feed_forward.*", "6", "--lora.alpha_pattern", "w2", "5.0")
HEAD_TOO = ("--lora.target_modules=all-linear,output",)
EXPERTS_TOO = ("--lora.target_modules=all-linear,experts", "--lora.expert_rank=3")
PISSA = ("--lora.init=pissa",)
PACKED = ("--lora.base_format=nf4",)
DORA = ("--lora.use_dora",)
PACKED_EXPERTS = (*PACKED, *EXPERTS_TOO)
EXPERTS_ALONE = ("--lora.target_modules=*.experts.w1,*.experts.w2",)
IN_FULL = ("--lora.train_also=tok_embeddings,output,norm,layers.*.*_norm", "--lora.train_also_lr=1e-3")
NORMS = ("--lora.train_also=norm,layers.*.*_norm", "--lora.train_also_lr=1e-3")
IN_FULL_TIED = ("--lora.train_also=tok_embeddings,norm,layers.*.*norm",)
NEW_TOKENS = ("--lora.new_tokens=$,+," + ",".join(f"<new {k}>" for k in range(64)), "--lora.train_also_lr=1e-3")
"""Two that the tokenizer has, 62 for which the base of 320 rows has some, and two for which it has none."""

ODD_VOCABULARY = ("--lora.new_tokens=" + ",".join(f"<new {k}>" for k in range(63)),)
"""321 rows."""

VARIANTS = {
    "new tokens, FSDP2": row(2, FSDP2, job=NEW_TOKENS),
    "new tokens, DDP2": row(2, DDP2, job=NEW_TOKENS),
    "new tokens, TP2": row(2, TP2, job=NEW_TOKENS),
    "new tokens, PP2": row(2, PP2, job=NEW_TOKENS),
    "new tokens, CP2": row(2, CP2, job=NEW_TOKENS),
    "new tokens, PP2 interleaved": row(2, PP2, INTERLEAVED, job=NEW_TOKENS),
    "new tokens, HSDP 2x2": row(4, REPLICATE2, FSDP2, job=NEW_TOKENS),
    "new tokens, TP2 x FSDP2": row(4, TP2, FSDP2, job=NEW_TOKENS),
    "new tokens, CP2 x TP2": row(4, CP2, TP2, job=NEW_TOKENS),
    "new tokens, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, job=NEW_TOKENS),
    "new tokens, PP2 x CP2 x FSDP2": row(8, PP2, CP2, FSDP2, job=NEW_TOKENS),
    "new tokens, MoE, EP2": row(2, FSDP2, EP2, model="deepseek_v3", job=NEW_TOKENS),
    "new tokens, MoE, EP2 x TP2": row(4, FSDP2, EP2, TP2, ETP2, model="deepseek_v3", job=NEW_TOKENS),
    "new tokens, accumulation, TP2": row(2, TP2, job=NEW_TOKENS, microbatches=2),
    "new tokens, accumulation, DDP2": row(2, DDP2, job=NEW_TOKENS, microbatches=2),
    "new tokens and full AC, FSDP2": row(2, FSDP2, FULL_AC, job=NEW_TOKENS),
    "new tokens, loss that is not parallel, TP2": row(2, TP2, ["--parallelism.disable_loss_parallel"], job=NEW_TOKENS),
    "new tokens, an odd vocabulary, TP2": row(2, TP2, job=ODD_VOCABULARY),
    "new tokens, an odd vocabulary, TP2 x FSDP2": row(4, TP2, FSDP2, job=ODD_VOCABULARY),
    "new tokens in full, FSDP2": row(2, FSDP2, job=(*NEW_TOKENS, *IN_FULL)),
    "new tokens in full, TP2": row(2, TP2, job=(*NEW_TOKENS, *IN_FULL)),
    "new tokens in full, PP2": row(2, PP2, job=(*NEW_TOKENS, *IN_FULL)),
    "new tokens in full and tied, FSDP2": row(2, FSDP2, model="qwen3_tied", job=(*NEW_TOKENS, *IN_FULL_TIED)),
    "new tokens, of which the head's are in full, TP2": row(2, TP2, job=(*NEW_TOKENS, "--lora.train_also=output")),
    "new tokens and a tied head, TP2": row(2, TP2, model="qwen3_tied", job=NEW_TOKENS),
    "new tokens and a tied head, FSDP2": row(2, FSDP2, model="qwen3_tied", job=NEW_TOKENS),
    "new tokens, DoRA and norms in full, FSDP2": row(2, FSDP2, job=(*NEW_TOKENS, *DORA, *NORMS)),
    "new tokens, DoRA and norms in full, TP2": row(2, TP2, job=(*NEW_TOKENS, *DORA, *NORMS)),
    "new tokens, PiSSA and norms in full, TP2": row(2, TP2, job=(*NEW_TOKENS, *PISSA, *NORMS)),
    "new tokens, PiSSA and norms in full, PP2": row(2, PP2, job=(*NEW_TOKENS, *PISSA, *NORMS)),
    "new tokens, packed, TP2": row(2, TP2, model="llama3_wide", job=(*PACKED, *NEW_TOKENS)),
    "in full, FSDP2": row(2, FSDP2, job=IN_FULL),
    "in full, DDP2": row(2, DDP2, job=IN_FULL),
    "in full, TP2": row(2, TP2, job=IN_FULL),
    "in full, PP2": row(2, PP2, job=IN_FULL),
    "in full, CP2": row(2, CP2, job=IN_FULL),
    "in full, HSDP 2x2": row(4, REPLICATE2, FSDP2, job=IN_FULL),
    "in full, TP2 x FSDP2": row(4, TP2, FSDP2, job=IN_FULL),
    "in full, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, job=IN_FULL),
    "in full, accumulation, TP2": row(2, TP2, job=IN_FULL, microbatches=2),
    "in full, accumulation, DDP2": row(2, DDP2, job=IN_FULL, microbatches=2),
    "in full and full AC, FSDP2": row(2, FSDP2, FULL_AC, job=IN_FULL),
    "in full, loss that is not parallel, TP2": row(2, TP2, ["--parallelism.disable_loss_parallel"], job=IN_FULL),
    "in full and tied, TP2": row(2, TP2, model="qwen3_tied", job=IN_FULL_TIED),
    "in full, qwen3, TP2 x FSDP2": row(4, TP2, FSDP2, model="qwen3", job=IN_FULL_TIED),
    "in full, MoE, EP2": row(2, FSDP2, EP2, model="deepseek_v3", job=IN_FULL),
    "in full, MoE, TP2": row(2, TP2, model="deepseek_v3", job=IN_FULL),
    "rank 3 and the output head, TP2": row(2, TP2, job=("--lora.rank=3", *HEAD_TOO)),
    "qwen3 and the output head, TP2": row(2, TP2, model="qwen3", job=HEAD_TOO),
    "patterns, FSDP2": row(2, FSDP2, job=PATTERNS),
    "patterns, TP2": row(2, TP2, job=PATTERNS),
    "patterns, PP2": row(2, PP2, job=PATTERNS),
    "patterns, CP2": row(2, CP2, job=PATTERNS),
    "patterns, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, job=PATTERNS),
    "fake-quantized weights, FSDP2": row(2, FSDP2, job=WEIGHTS_ALONE),
    "fake-quantized weights, PP2": row(2, PP2, job=WEIGHTS_ALONE),
    "rsLoRA, FSDP2": row(2, FSDP2, job=("--lora.use_rslora",)),
    "adapters in the last layer alone, PP2": row(2, PP2, job=("--lora.target_modules=layers.3.*",)),
    "adapters in the first layer alone, PP2": row(2, PP2, job=("--lora.target_modules=layers.0.*",)),
    "accumulation, TP2": row(2, TP2, microbatches=2),
    "accumulation, FSDP2": row(2, FSDP2, microbatches=2),
    "accumulation, DDP2": row(2, DDP2, microbatches=2),
    "full AC, TP2": row(2, TP2, FULL_AC),
    "selective AC by op, TP2": row(2, TP2, OP_SAC),
    "loss over logits, FSDP2": row(2, FSDP2, [*OVER_LOGITS]),
    "loss over logits, TP2": row(2, TP2, [*OVER_LOGITS]),
    "loss over logits, PP2": row(2, PP2, [*OVER_LOGITS]),
    "loss over logits, CP2": row(2, CP2, [*OVER_LOGITS]),
    "loss over logits, MoE, EP2": row(2, FSDP2, EP2, [*OVER_LOGITS], model="deepseek_v3"),
    "loss over logits, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, [*OVER_LOGITS]),
    "loss that is not parallel, TP2": row(2, TP2, ["--parallelism.disable_loss_parallel"]),
    "tied head, TP2": row(2, TP2, model="qwen3_tied"),
    "tied head, FSDP2": row(2, FSDP2, model="qwen3_tied"),
    "tied head, TP2 x FSDP2": row(4, TP2, FSDP2, model="qwen3_tied"),
    "tied head, HSDP 2x2": row(4, REPLICATE2, FSDP2, model="qwen3_tied"),
    "in full and tied, FSDP2": row(2, FSDP2, model="qwen3_tied", job=IN_FULL_TIED),
    "always reshard, FSDP2": row(2, FSDP2, ["--parallelism.fsdp_reshard_after_forward=always"]),
    "always reshard, TP2 x FSDP2": row(4, TP2, FSDP2, ["--parallelism.fsdp_reshard_after_forward=always"]),
    "dropout, TP2": row(2, TP2, job=DROPOUT),
    "dropout and full AC, TP2": row(2, TP2, FULL_AC, job=DROPOUT),
    "selective AC by layer, FSDP2": row(2, FSDP2, LAYER_SAC),
    "validation, FSDP2": row(2, FSDP2, VALIDATION),
    "CPU offload, FSDP2": row(2, FSDP2, ["--training.enable_cpu_offload"]),
    "accumulation, TP2 x FSDP2": row(4, TP2, FSDP2, microbatches=2),
    "MoE, TP2": row(2, TP2, model="deepseek_v3"),
    "qwen3 MoE, EP2": row(2, FSDP2, EP2, model="qwen3_moe"),
    "llama4, EP2": row(2, FSDP2, EP2, model="llama4"),
    "gpt_oss, FSDP2": row(2, FSDP2, model="gpt_oss"),
    "gpt_oss, EP2": row(2, FSDP2, EP2, model="gpt_oss"),
    "gpt_oss, TP2": row(2, TP2, model="gpt_oss"),
    "experts of qwen3, FSDP2": row(2, FSDP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3, EP2": row(2, FSDP2, EP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3, TP2": row(2, TP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3, CP2": row(2, CP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3, DDP2": row(2, DDP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3 alone, EP2 x FSDP2": row(4, FSDP4, EP2, model="qwen3_loop", job=EXPERTS_ALONE),
    "experts of qwen3 in grouped products, EP2": row(2, FSDP2, EP2, model="qwen3_moe", job=EXPERTS_TOO, rounding=100),
    "experts of qwen3, TP2 x FSDP2": row(4, TP2, FSDP2, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of qwen3, EP4 x FSDP2 by features": row(8, FSDP8, EP4, model="qwen3_loop", job=EXPERTS_TOO),
    "experts of deepseek_v3, FSDP2": row(2, FSDP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, EP2": row(2, FSDP2, EP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, TP2": row(2, TP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, PP2": row(2, PP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, HSDP 2x2": row(4, REPLICATE2, FSDP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, EP4": row(4, FSDP4, EP4, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of deepseek_v3, EP2 x TP2": row(4, FSDP2, EP2, TP2, ETP2, model="deepseek_v3", job=EXPERTS_TOO),
    "experts of llama4, EP2": row(2, FSDP2, EP2, model="llama4", job=EXPERTS_TOO),
    "experts of gpt_oss, FSDP2": row(2, FSDP2, model="gpt_oss", job=EXPERTS_TOO),
    "experts of gpt_oss, DDP2": row(2, DDP2, model="gpt_oss", job=EXPERTS_TOO),
    "experts of gpt_oss, EP2": row(2, FSDP2, EP2, model="gpt_oss", job=EXPERTS_TOO),
    "experts of gpt_oss, TP2": row(2, TP2, model="gpt_oss", job=EXPERTS_TOO),
    "experts of gpt_oss, TP2 x FSDP2": row(4, TP2, FSDP2, model="gpt_oss", job=EXPERTS_TOO),
    "experts of gpt_oss, EP4 x FSDP2 by features": row(8, FSDP8, EP4, model="gpt_oss", job=EXPERTS_TOO),
    "packed, FSDP2": row(2, FSDP2, model="llama3_wide", job=PACKED),
    "packed, DDP2": row(2, DDP2, model="llama3_wide", job=PACKED),
    "packed, TP2": row(2, TP2, model="llama3_wide", job=PACKED),
    "packed, PP2": row(2, PP2, model="llama3_wide", job=PACKED),
    "packed, PP2 interleaved": row(2, PP2, INTERLEAVED, model="llama3_wide", job=PACKED),
    "packed, CP2": row(2, CP2, model="llama3_wide", job=PACKED),
    "packed, HSDP 2x2": row(4, REPLICATE2, FSDP2, model="llama3_wide", job=PACKED),
    "packed, TP2 x FSDP2": row(4, TP2, FSDP2, model="llama3_wide", job=PACKED),
    "packed, CP2 x TP2": row(4, CP2, TP2, model="llama3_wide", job=PACKED),
    "packed, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, model="llama3_wide", job=PACKED),
    "packed, PP2 x CP2 x FSDP2": row(8, PP2, CP2, FSDP2, model="llama3_wide", job=PACKED),
    "packed and full AC, TP2": row(2, TP2, FULL_AC, model="llama3_wide", job=PACKED),
    "packed and selective AC by op, FSDP2": row(2, FSDP2, OP_SAC, model="llama3_wide", job=PACKED),
    "packed, CPU offload, FSDP2": row(2, FSDP2, ["--training.enable_cpu_offload"], model="llama3_wide", job=PACKED),
    "packed experts, FSDP2": row(2, FSDP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, EP2": row(2, FSDP2, EP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, TP2": row(2, TP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, PP2": row(2, PP2, model="deepseek_wide", job=PACKED_EXPERTS),
    "packed experts, CP2": row(2, CP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, EP2 x FSDP2": row(4, FSDP4, EP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, EP4 x FSDP2 by features": row(8, FSDP8, EP4, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, DDP2": row(2, DDP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, HSDP 2x2": row(4, REPLICATE2, FSDP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, TP2 x FSDP2": row(4, TP2, FSDP2, model="qwen3_wide", job=PACKED_EXPERTS),
    "packed experts, EP2 x TP2": row(4, FSDP2, EP2, TP2, ETP2, model="deepseek_wide", job=PACKED_EXPERTS),
    "packed experts without adapters, EP2": row(2, FSDP2, EP2, model="qwen3_wide", job=PACKED),
    "packed experts without adapters, TP2": row(2, TP2, model="qwen3_wide", job=PACKED),
    "DoRA, FSDP2": row(2, FSDP2, job=DORA),
    "DoRA, DDP2": row(2, DDP2, job=DORA),
    "DoRA, TP2": row(2, TP2, job=DORA),
    "DoRA, PP2": row(2, PP2, job=DORA),
    "DoRA, CP2": row(2, CP2, job=DORA),
    "DoRA, PP2 interleaved": row(2, PP2, INTERLEAVED, job=DORA),
    "DoRA, HSDP 2x2": row(4, REPLICATE2, FSDP2, job=DORA),
    "DoRA, TP2 x FSDP2": row(4, TP2, FSDP2, job=DORA),
    "DoRA, CP2 x TP2": row(4, CP2, TP2, job=DORA),
    "DoRA, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, job=DORA),
    "DoRA, PP2 x CP2 x FSDP2": row(8, PP2, CP2, FSDP2, job=DORA),
    "DoRA, MoE, EP2": row(2, FSDP2, EP2, model="deepseek_v3", job=DORA),
    "DoRA, MoE, TP2": row(2, TP2, model="deepseek_v3", job=DORA),
    "DoRA and full AC, TP2": row(2, TP2, FULL_AC, job=DORA),
    "DoRA and dropout, TP2": row(2, TP2, job=(*DORA, *DROPOUT)),
    "DoRA and the output head, TP2": row(2, TP2, model="qwen3", job=(*DORA, *HEAD_TOO)),
    "DoRA and modules in full, TP2": row(2, TP2, job=(*DORA, *IN_FULL)),
    "DoRA and selective AC by op, FSDP2": row(2, FSDP2, OP_SAC, job=DORA),
    "DoRA, CPU offload, FSDP2": row(2, FSDP2, ["--training.enable_cpu_offload"], job=DORA),
    "PiSSA, FSDP2": row(2, FSDP2, job=PISSA),
    "PiSSA, DDP2": row(2, DDP2, job=PISSA),
    "PiSSA, TP2": row(2, TP2, job=PISSA),
    "PiSSA, PP2": row(2, PP2, job=PISSA),
    "PiSSA, PP2 interleaved": row(2, PP2, INTERLEAVED, job=PISSA),
    "PiSSA, CP2": row(2, CP2, job=PISSA),
    "PiSSA, MoE, EP2": row(2, FSDP2, EP2, model="deepseek_v3", job=PISSA),
    "PiSSA, HSDP 2x2": row(4, REPLICATE2, FSDP2, job=PISSA),
    "PiSSA, TP2 x FSDP2": row(4, TP2, FSDP2, job=PISSA),
    "PiSSA, CP2 x TP2": row(4, CP2, TP2, job=PISSA),
    "PiSSA, PP2 x TP2 x FSDP2": row(8, PP2, TP2, FSDP2, job=PISSA),
    "PiSSA, PP2 x CP2 x FSDP2": row(8, PP2, CP2, FSDP2, job=PISSA),
    "PiSSA, CPU offload, FSDP2": row(2, FSDP2, ["--training.enable_cpu_offload"], job=PISSA),
    "PiSSA and full AC, TP2": row(2, TP2, FULL_AC, job=PISSA),
    "OLoRA and the output head, TP2": row(2, TP2, job=("--lora.init=olora", *HEAD_TOO)),
    "experts and full AC, EP2": row(2, FSDP2, EP2, FULL_AC, model="deepseek_v3", job=EXPERTS_TOO),
    "experts and selective AC by op, TP2": row(2, TP2, OP_SAC, model="qwen3_loop", job=EXPERTS_TOO),
}
"""The same claim for what layouts meet in practice."""

COMPILED = {
    "compile and full AC, FSDP2": row(2, FSDP2, COMPILE, FULL_AC),
    "compile, TP2": row(2, TP2, COMPILE),
    "compile and DoRA, TP2": row(2, TP2, COMPILE, job=DORA),
    "compile and PiSSA, TP2": row(2, TP2, COMPILE, job=PISSA),
}

SIX = ("FSDP2", "TP2", "PP2 1F1B", "CP2", "MoE, EP2", "PP2 x TP2 x FSDP2")
"""Of the table, with one rank the layouts on which every feature runs in CI."""

QUICK = (*SIX, "DDP2", "HSDP 2x2")
"""The quick tier's: every kind of parallelism once."""

BY_HAND = (
    *(f"new tokens, {layout}" for layout in ("DDP2", "PP2 interleaved", "HSDP 2x2", "TP2 x FSDP2", "CP2 x TP2")),
    *("new tokens, PP2 x CP2 x FSDP2", "new tokens, MoE, EP2", "new tokens, MoE, EP2 x TP2"),
    *("new tokens, accumulation, TP2", "new tokens, accumulation, DDP2", "new tokens and full AC, FSDP2"),
    *("new tokens, loss that is not parallel, TP2", "new tokens, an odd vocabulary, TP2 x FSDP2"),
    *(f"experts of qwen3, {layout}" for layout in ("FSDP2", "EP2", "TP2", "DDP2", "TP2 x FSDP2")),
    "experts of deepseek_v3, EP4",
    *("tied head, TP2 x FSDP2", "tied head, HSDP 2x2"),
    *(f"PiSSA, {layout}" for layout in ("DDP2", "PP2 interleaved", "HSDP 2x2", "TP2 x FSDP2", "CP2 x TP2")),
    *("PiSSA, PP2 x CP2 x FSDP2", "PiSSA and full AC, TP2", "PiSSA, CPU offload, FSDP2", "compile and PiSSA, TP2"),
    *(f"DoRA, {layout}" for layout in ("DDP2", "PP2 interleaved", "HSDP 2x2", "TP2 x FSDP2", "CP2 x TP2")),
    *("DoRA, PP2 x CP2 x FSDP2", "DoRA, CPU offload, FSDP2", "DoRA and full AC, TP2"),
    *("DoRA and selective AC by op, FSDP2", "compile and DoRA, TP2"),
    *(f"packed, {layout}" for layout in ("DDP2", "PP2 interleaved", "HSDP 2x2", "TP2 x FSDP2", "CP2 x TP2")),
    *("packed, PP2 x CP2 x FSDP2", "packed and full AC, TP2", "packed, CPU offload, FSDP2"),
    *(f"packed experts, {layout}" for layout in ("DDP2", "HSDP 2x2", "TP2 x FSDP2", "EP2 x FSDP2", "EP2 x TP2")),
    *("packed experts, FSDP2", "packed experts without adapters, TP2"),
    *(f"experts of gpt_oss, {layout}" for layout in ("FSDP2", "DDP2", "TP2 x FSDP2", "EP4 x FSDP2 by features")),
)
"""`scripts/parity.sh` alone runs these: CI has each of their layouts with another model, or each of their parts."""

ALL_ROWS = {**TABLE, **VARIANTS, **COMPILED}


def build_row(row: Row, folder: Path, bases: Path, *more: str) -> Run:
    """A trainer of this row, fed with the global batches. B is random once the base is loaded."""
    run = build(
        folder,
        *base_options(row.model, bases),
        f"--training.steps={STEPS}",
        f"--training.global_batch_size={ROWS}",
        f"--training.local_batch_size={ROWS // row.degree // row.microbatches}",
        "--optimizer.eps=1e-5",
        "--training.max_norm=0.5",
        "--checkpoint.interval=5",
        "--lora.loss_chunk_tokens=24",
        *row.job,
        *row.layout,
        *more,
    )
    feed_global_batches(run)
    load = run.trainer.checkpointer.load

    def load_and_fill(step: int = -1) -> bool:
        loaded = load(step)
        if run.trainer.step == 0:
            run.begun = first_products(run)
            fill_b(run)
            run.loaded = adapter_state(run)
        return loaded

    run.trainer.checkpointer.load = load_and_fill
    return run


def feed_global_batches(run: Run) -> None:
    """Every layout reads the same rows at each step: data-parallel ranks and micro-batches split one global batch."""
    mesh = run.trainer.parallel_dims.get_optional_mesh("batch")
    rank, degree = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    microbatches = run.trainer.gradient_accumulation_steps
    rows = ROWS // degree // microbatches
    new_tokens = list(run.trainer.checkpointer.run.job.tokens.values())[-8:]

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for step in itertools.count(run.trainer.step):
            generator = torch.Generator().manual_seed(step)
            # Short cycles, so that there is something to learn in ten steps.
            start = torch.randint(0, 64, (ROWS, 1), generator=generator)
            tokens = (start + 7 * torch.arange(TOKENS + 1)) % 64
            for old, new in enumerate(new_tokens):
                tokens[tokens == 8 * old] = new
            for micro in range(microbatches):
                first = (rank * microbatches + micro) * rows
                part = tokens[first : first + rows]
                yield {"input": part[:, :-1]}, part[:, 1:]

    generate = run.trainer.batch_generator
    run.trainer.batch_generator = lambda _: generate(batches())


def fill_b(run: Run) -> None:
    """And what began at the base's weight, whose decomposition has other signs and last digits on other shards."""
    filled = ("lora_b.weight", "_lora_b", "lora_a0.weight", "lora_b0.weight")
    filled += ("lora_a.weight",) * bool(run.trainer.job_config.lora.init)
    for part in run.trainer.model_parts:
        for name, param in adapter_parameters(part).items():
            if name.endswith(filled):
                generator = torch.Generator().manual_seed(stable_hash(name))
                copy_full_(param, torch.empty(param.shape).normal_(std=0.05, generator=generator))


def whole_adapter(run: Run) -> dict[str, torch.Tensor]:
    """The adapters of all pipeline stages, as full tensors, on every rank."""
    gathered: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, adapter_state(run))
    return {name: value for part in gathered for name, value in part.items()}


def first_products(run: Run) -> dict[str, torch.Tensor]:
    """B₀ A₀ of what begins at the base's weight, after a look at whether the update is zero."""
    state = whole_adapter(run)
    for name in [name for name in state if name.endswith("0.weight")]:
        assert torch.equal(state[name], state[name.replace("0.weight", ".weight")])
    names = [name for name in state if name.endswith("lora_b0.weight")]
    return {name: state[name] @ state[name.replace("lora_b0", "lora_a0")] for name in names}


def packed_base(run: Run) -> dict[str, str]:
    """A digest of each packed weight, of all pipeline stages, on every rank."""
    base = run.trainer.checkpointer.run.model.base.state_dict()
    own = {
        name: hashlib.sha256(full_tensor(base[name]).numpy().tobytes()).hexdigest()
        for part in run.trainer.model_parts
        for name in packed_formats(part)
    }
    gathered: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: value for part in gathered for name, value in part.items()}


def losses_of(run: Run) -> list[float]:
    """Under PP the last stage alone knows the loss; the others log -1."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)
    return losses.tolist()


def train_row(row: Row, folder: Path, bases: Path, *more: str) -> dict[str, Any]:
    """Ten steps. Returns losses, gradient norms, the adapters before and after, and the sums of partial gradients."""
    sums: list[int] = []
    complete = optimizer.sum_partial_gradients
    run = build_row(row, folder, bases, *more)
    initial = {name: value for name, value in whole_adapter(run).items() if "lora_" in name}
    optimizer.sum_partial_gradients = lambda params: sums.append(complete(params))
    try:
        finish(run)
    finally:
        optimizer.sum_partial_gradients = complete
    return {
        "losses": losses_of(run),
        "grad_norms": run.grad_norms,
        "initial": initial,
        "begun": run.begun,
        "final": whole_adapter(run),
        "base": {name: value for name, value in run.loaded.items() if "lora_" not in name},
        "sums": sums,
        "packed": packed_base(run),
    }


def compare_row(name: str, folder: Path) -> dict[str, float]:
    """The figures of one row: largest relative differences to one rank."""
    row, bases = ALL_ROWS[name], folder.parent.parent
    reference = torch.load(bases / f"{row.key}.pt", weights_only=True)
    result = train_row(row, folder, bases)
    assert result["initial"].keys() == reference["initial"].keys()
    unequal = [n for n in result["initial"] if not torch.equal(result["initial"][n], reference["initial"][n])]
    assert not unequal, f"initial adapters differ: {unequal}"
    assert result["packed"] == reference["packed"]
    assert result["begun"].keys() == reference["begun"].keys()
    for weight, product in reference["begun"].items():
        assert product.any() and (result["begun"][weight] - product).norm() < 1e-3 * product.norm(), weight
    # One all-reduce per step completes the gradients under TP, however many micro-batches, stages and shards there are.
    trains_here = bool(result["final"]) and not name.startswith("adapters in")
    assert result["sums"] == [int("TP2" in name and trains_here)] * STEPS, result["sums"]
    return {
        "loss": relative(result["losses"], reference["losses"]),
        "grad_norm": relative(result["grad_norms"], reference["grad_norms"]),
        "adapter": max(
            # Of what the base has already, by how far it moved.
            ((result["final"][n] - value).norm() / (value - reference["base"].get(n, 0)).norm()).item()
            for n, value in reference["final"].items()
        ),
    }


def relative(values: list[float], expected: list[float]) -> float:
    assert len(values) == len(expected)
    return max(abs(value - reference) / abs(reference) for value, reference in zip(values, expected, strict=True))


if __name__ == "__main__":
    main({name: (lambda folder, name=name: compare_row(name, folder)) for name in ALL_ROWS})
