"""What forked ranks need, imported once, in the process that they are forked from."""

import harness  # noqa: F401  (before torchtitan)
import hf_models  # noqa: F401
import parity  # noqa: F401
import torch
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

import lora_converter.titan.converter  # noqa: F401
from lora_converter.train import main as main

llama3_args["torture"] = TransformerModelArgs(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=96, rope_theta=500000
)
torch.set_num_threads(1)
