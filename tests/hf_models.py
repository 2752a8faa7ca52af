"""The models of `hf_tiny.py` as Hugging Face folders, and what torchtitan calls the same architectures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_tiny import tiny_deepseek_v3, tiny_llama, tiny_llama4, tiny_qwen3, tiny_qwen3_moe
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.gpt_oss import GptOssModelArgs, gptoss_configs
from torchtitan.models.llama4 import TransformerModelArgs as Llama4ModelArgs
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args
from transformers import PreTrainedModel


@dataclass(frozen=True)
class HFModel:
    """A transformers model and torchtitan's options for the same architecture."""

    make: Callable[[], PreTrainedModel]
    options: tuple[str, ...] = ()
    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    atol: float = 1e-4
    """Of logits around 3 in fp32: the attention kernel is another one."""


qwen3_args["hf_tiny"] = Qwen3ModelArgs(
    vocab_size=320, head_dim=24, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, qk_norm=True, hidden_dim=160,
    rope_theta=1000000.0, norm_eps=1e-6,
)  # fmt: skip

qwen3_args["hf_tiny_moe"] = replace(
    qwen3_args["hf_tiny"], moe_enabled=True, moe_inter_dim=48,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=0, top_k=2, score_func="softmax", route_norm=True,
                     score_before_experts=False, use_grouped_mm=False),
)  # fmt: skip

deepseekv3_args["hf_tiny"] = DeepSeekV3ModelArgs(
    vocab_size=320, dim=64, inter_dim=160, moe_inter_dim=48, n_layers=3, n_dense_layers=1, n_heads=4, norm_eps=1e-5,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, score_func="sigmoid", route_norm=True,
                     score_before_experts=False),
    q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip

llama4_args["hf_tiny"] = Llama4ModelArgs(
    vocab_size=320, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, norm_eps=1e-5, rope_theta=500000,
    interleave_moe_layer_step=1,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=1, score_func="sigmoid", route_norm=False,
                     score_before_experts=True),
)  # fmt: skip

llama4_args["hf_tiny_dense"] = replace(llama4_args["hf_tiny"], interleave_moe_layer_step=2)

gptoss_configs["hf_tiny"] = GptOssModelArgs(
    vocab_size=320, dim=64, moe_inter_dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32,
    moe_args=MoEArgs(num_experts=4, num_shared_experts=0, top_k=2, score_func="softmax", route_norm=True,
                     gate_bias=True, score_before_experts=False),
)  # fmt: skip

HF_MODELS = {
    "llama3": HFModel(tiny_llama),
    "deepseek_v3": HFModel(
        tiny_deepseek_v3,
        # Attention alone: PEFT 0.21 takes every gate, up and down projection of an MoE model for a routed expert's.
        ("--model.name=deepseek_v3", "--model.flavor=hf_tiny", "--lora.target_modules=*.attention.*"),
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        atol=3e-4,  # the bare bases differ by 1e-4: RoPE is rotated as complex numbers there, as reals here
    ),
    "llama4": HFModel(
        tiny_llama4,
        ("--model.name=llama4", "--model.flavor=hf_tiny", "--lora.target_modules=*.attention.*"),
        r"language_model\..*\.[qkvo]_proj",
    ),
    "qwen3_moe": HFModel(tiny_qwen3_moe, ("--model.name=qwen3", "--model.flavor=hf_tiny_moe")),
    "qwen3": HFModel(tiny_qwen3, ("--model.name=qwen3", "--model.flavor=hf_tiny")),
}


def save_hf(name: str, folder: Path) -> Path:
    HF_MODELS[name].make().save_pretrained(folder)
    return folder
