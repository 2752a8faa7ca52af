"""Tiny mixtures of experts of `transformers`, with random weights, and Hugging Face folders of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, head_dim=8,
    num_experts_per_tok=2, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def qwen3_moe(inner: int = 24) -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, num_experts=4, intermediate_size=40, moe_intermediate_size=inner)
    return with_random_weights(Qwen3MoeForCausalLM, config)


def deepseek_v3(inner: int = 24) -> PreTrainedModel:
    """One dense layer, and a shared expert beside the routed ones."""
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
        intermediate_size=40, moe_intermediate_size=inner, n_group=1, topk_group=1, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    return with_random_weights(DeepseekV3ForCausalLM, config)


def mixtral(inner: int = 24) -> PreTrainedModel:
    config = MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=inner)
    return with_random_weights(MixtralForCausalLM, config)


def llama4(inner: int = 24) -> PreTrainedModel:
    """Experts (experts, in, out)."""
    config = Llama4TextConfig(
        **{**SIZES, "num_experts_per_tok": 1}, num_local_experts=4, intermediate_size=inner, intermediate_size_mlp=40,
        interleave_moe_layer_step=1, use_qk_norm=False, attn_temperature_tuning=False,
    )  # fmt: skip
    return with_random_weights(Llama4ForCausalLM, config)


def gpt_oss(inner: int = 24) -> PreTrainedModel:
    """Experts (experts, in, out), gate and up in turns, flagged as transposed."""
    config = GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=inner, sliding_window=16)
    return with_random_weights(GptOssForCausalLM, config)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    make.__name__: make for make in (qwen3_moe, deepseek_v3, mixtral, llama4, gpt_oss)
}
FUSED_BY_TRANSFORMERS = ("qwen3_moe", "deepseek_v3", "mixtral")
"""Those whose published files hold experts one by one."""

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def save_fused(model: PreTrainedModel, folder: Path) -> Path:
    """A folder with the model's weights as transformers 5 has them in memory, experts stacked."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def with_random_weights(cls: type, config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.1)
    return model
