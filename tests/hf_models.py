"""Tiny `transformers` models with random weights, saved as Hugging Face folders: bases that nobody here wrote."""

import json
from pathlib import Path

import torch
from harness import TINY
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(*, seed: int = 0, hidden_size: int = TINY["dim"]) -> LlamaForCausalLM:
    """The `tiny` flavor as transformers has it: fp32, grouped-query attention, Llama 3 RoPE scaling."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=192,
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
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from 1, weights large enough that attention is not uniform.
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.08)
    return model


def save_tiny_llama(folder: Path, **options: int) -> Path:
    """Writes `tiny_llama` where torchtitan and transformers read it."""
    tiny_llama(**options).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder
