"""Tiny `transformers` models with random weights, saved as Hugging Face folders: bases that nobody here wrote."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import TINY
from safetensors.torch import save_file
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.gpt_oss import GptOssModelArgs, gptoss_configs
from torchtitan.models.llama4 import TransformerModelArgs as Llama4ModelArgs
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def tiny_llama(*, seed: int = 0, hidden_size: int = TINY["dim"], intermediate_size: int = 192) -> LlamaForCausalLM:
    """The `tiny` flavor as transformers has it: fp32, grouped-query attention, Llama 3 RoPE scaling."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=TINY["n_layers"],
        num_attention_heads=TINY["n_heads"],
        num_key_value_heads=TINY["n_kv_heads"],
        vocab_size=TINY["vocab_size"],
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        attn_implementation="eager",
    )
    return _with_random_weights(LlamaForCausalLM, config, seed)


def save_tiny_llama(folder: Path, **options: int) -> Path:
    """Writes `tiny_llama` where torchtitan and transformers read it."""
    tiny_llama(**options).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder


def tiny_qwen3(*, tied: bool = False) -> PreTrainedModel:
    """Grouped-query attention with q/k norms and a head dim that is not dim / heads."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=320,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attn_implementation="eager",
    )
    return _with_random_weights(Qwen3ForCausalLM, config, 0)


def tiny_deepseek_v3() -> PreTrainedModel:
    """Latent attention with a low-rank query, one dense layer, then experts with a shared one."""
    config = DeepseekV3Config(
        hidden_size=64,
        intermediate_size=160,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        q_lora_rank=24,
        kv_lora_rank=40,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        vocab_size=320,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    return _with_random_weights(DeepseekV3ForCausalLM, config, 0)


def tiny_qwen3_moe() -> PreTrainedModel:
    """Experts in every layer, no shared one."""
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=160,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=320,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attn_implementation="eager",
    )
    return _with_random_weights(Qwen3MoeForCausalLM, config, 0)


def tiny_llama4() -> PreTrainedModel:
    """Experts in every layer, a shared one too, and a vision tower whose linears have the decoder's names."""
    config = Llama4Config(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 320,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "use_qk_norm": False,  # these two torchtitan's model does not have
            "attn_temperature_tuning": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        attn_implementation="eager",
    )
    return _with_random_weights(Llama4ForConditionalGeneration, config, 0)


def tiny_gpt_oss() -> PreTrainedModel:
    """Biases on every attention linear, sinks, a sliding window that the test's sequences do not fill."""
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=320,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    model = _with_random_weights(GptOssForCausalLM, config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # torchtitan builds its model in bf16
    return model


def save_gpt_oss(model: PreTrainedModel, folder: Path) -> Path:
    """Under the names of the published checkpoints, which torchtitan reads: experts as blocks, (out, in)."""
    tensors = {
        f"{name}_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name: (
            value.transpose(-1, -2) if name.endswith(("gate_up_proj", "down_proj")) else value
        ).contiguous()
        for name, value in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _with_random_weights(cls: type, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = cls(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from 1, weights large enough that attention is not uniform.
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.08)
    return model


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
