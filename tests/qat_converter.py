"""A model converter of a user's: quantization-aware training with torchao, int8 inputs and int4 weights."""

from typing import Any

import torch
import torch.nn as nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchtitan.protocols.model_converter import register_model_converter

CONFIG = QATConfig(
    activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
    weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32),
    step="prepare",
)

JOB = ("--experimental.custom_import=qat_converter", "--model.converters=my_qat,lora")


def all_but_the_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name not in ("output", "lm_head")


class MyQAT:
    def __init__(self, job_config: Any, parallel_dims: Any):
        pass

    def convert(self, model: nn.Module) -> None:
        quantize_(model, CONFIG, filter_fn=all_but_the_head)

    def post_optimizer_hook(self, model: Any) -> None:
        pass


register_model_converter(MyQAT, "my_qat")
