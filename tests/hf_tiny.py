"""Tiny `transformers` models with random weights: bases that nobody here wrote, for any host."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
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


def tiny_llama(*, seed: int = 0, hidden_size: int = 64, intermediate_size: int = 192) -> LlamaForCausalLM:
    """Unequal everywhere, so that no transpose goes unseen: fp32, grouped-query attention, Llama 3 RoPE scaling."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
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
    return with_random_weights(LlamaForCausalLM, config, seed)


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
    return with_random_weights(Qwen3ForCausalLM, config, 0)


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
    return with_random_weights(DeepseekV3ForCausalLM, config, 0)


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
    return with_random_weights(Qwen3MoeForCausalLM, config, 0)


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
    return with_random_weights(Llama4ForConditionalGeneration, config, 0)


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
    model = with_random_weights(GptOssForCausalLM, config, 0)
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


def with_random_weights(cls: type, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = cls(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from 1, weights large enough that attention is not uniform.
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.08)
    return model
