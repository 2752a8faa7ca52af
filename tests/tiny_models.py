"""The flavor "tiny" of torchtitan's other models beside the Llama of `harness.py`, and where jobs on them begin."""

from dataclasses import replace
from pathlib import Path

import torch
from harness import TINY
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.gpt_oss import GptOssModelArgs, gptoss_configs
from torchtitan.models.gpt_oss.model.model import GptOssModel
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.llama4 import TransformerModelArgs as Llama4ModelArgs
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

# Unequal dims everywhere, as the tiny Llama's.
deepseekv3_args["tiny"] = DeepSeekV3ModelArgs(
    vocab_size=320,
    dim=64,
    inter_dim=160,
    moe_inter_dim=48,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, score_func="softmax", route_norm=True),
    q_lora_rank=24,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
qwen3_args["tiny"] = Qwen3ModelArgs(
    vocab_size=320, head_dim=24, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, qk_norm=True, hidden_dim=160
)
qwen3_args["tiny_moe"] = replace(
    qwen3_args["tiny"],
    moe_enabled=True,
    moe_inter_dim=48,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=0, top_k=2, score_func="softmax", route_norm=True),
)
qwen3_args["tiny_tied"] = replace(qwen3_args["tiny"], enable_weight_tying=True)
qwen3_args["tiny_loop"] = replace(  # for torchtitan's grouped products are bf16, on CPU too
    qwen3_args["tiny_moe"], moe_args=replace(qwen3_args["tiny_moe"].moe_args, use_grouped_mm=False)
)
llama4_args["tiny"] = Llama4ModelArgs(
    **TINY,
    every_n_layers_nope=None,
    interleave_moe_layer_step=2,
    attn_type="sdpa",
    moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=1, score_func="sigmoid"),
)
gptoss_configs["tiny"] = GptOssModelArgs(
    vocab_size=320,
    dim=64,
    head_dim=16,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    moe_inter_dim=48,
    sliding_window_size=16,
    moe_args=MoEArgs(
        num_experts=4, num_shared_experts=0, top_k=2, score_func="softmax", route_norm=True, use_grouped_mm=False
    ),
)


WIDE_LLAMA = dict(hidden_size=128, intermediate_size=384)
"""Of transformers' tiny Llama: columns of whole blocks of 64, two and more."""

llama3_args["tiny_wide"] = TransformerModelArgs(**{**TINY, "dim": 128, "multiple_of": 384})
qwen3_args["tiny_wide"] = replace(
    qwen3_args["tiny_loop"], dim=128, head_dim=32, hidden_dim=192, moe_inter_dim=128, n_layers=2
)
deepseekv3_args["tiny_wide"] = replace(
    deepseekv3_args["tiny"],
    **dict(dim=128, inter_dim=256, moe_inter_dim=128, n_layers=2, q_lora_rank=128, kv_lora_rank=128, v_head_dim=32),
    moe_args=replace(deepseekv3_args["tiny"].moe_args, use_grouped_mm=False),
)
gptoss_configs["tiny_wide"] = replace(gptoss_configs["tiny"], moe_inter_dim=64)


class GptOssInFp32(GptOssModel):
    """torchtitan's has its layers in bf16, in which sums in another order are another run."""

    def __init__(self, model_args: GptOssModelArgs):
        super().__init__(model_args)
        self.to(torch.float32)


register_train_spec("gpt_oss_in_fp32", replace(get_train_spec("gpt_oss"), model_cls=GptOssInFp32))

WIDE = ("--model.flavor=tiny_wide",)
MODELS = {
    "deepseek_v3": ["--model.name=deepseek_v3"],
    "qwen3": ["--model.name=qwen3"],
    "qwen3_tied": ["--model.name=qwen3", "--model.flavor=tiny_tied"],
    "qwen3_moe": ["--model.name=qwen3", "--model.flavor=tiny_moe"],
    "qwen3_loop": ["--model.name=qwen3", "--model.flavor=tiny_loop"],
    "llama4": ["--model.name=llama4"],
    "qwen3_wide": ["--model.name=qwen3", *WIDE],
    "deepseek_wide": ["--model.name=deepseek_v3", *WIDE],
    "gpt_oss": ["--model.name=gpt_oss_in_fp32"],
}
LLAMAS: dict[str, dict[str, int]] = {"llama3": {}, "llama3_wide": WIDE_LLAMA}


def base_options(model: str, bases: Path) -> list[str]:
    """The Llamas' bases are Hugging Face folders, the others' torchtitan's own seed checkpoints."""
    if model in LLAMAS:
        in_hf = [f"--checkpoint.initial_load_path={bases}/{model}", "--checkpoint.initial_load_in_hf"]
        return [*in_hf, *(WIDE if model == "llama3_wide" else ())]
    return [*MODELS[model], f"--checkpoint.initial_load_path={bases}/{model}/checkpoint/step-0"]
