"""Two model converters of a user's: quantization-aware training with torchao, of weights alone and of inputs too."""

from typing import Any, ClassVar

import torch
import torch.nn as nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchtitan.protocols.model_converter import register_model_converter

INT4_WEIGHTS = IntxFakeQuantizeConfig(torch.int4, group_size=32)
INT8_INPUTS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)

IMPORT = "--experimental.custom_import=qat_converter"
WEIGHTS_ALONE = (IMPORT, "--model.converters=my_int4,lora")
INPUTS_TOO = (IMPORT, "--model.converters=my_int8_int4,lora")


def all_but_the_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name not in ("output", "lm_head")


class Int4Weights:
    config: ClassVar = QATConfig(weight_config=INT4_WEIGHTS, step="prepare")

    def __init__(self, job_config: Any, parallel_dims: Any):
        pass

    def convert(self, model: nn.Module) -> None:
        quantize_(model, self.config, filter_fn=all_but_the_head)

    def post_optimizer_hook(self, model: Any) -> None:
        pass


class Int8InputsInt4Weights(Int4Weights):
    config: ClassVar = QATConfig(weight_config=INT4_WEIGHTS, activation_config=INT8_INPUTS, step="prepare")


register_model_converter(Int4Weights, "my_int4")
register_model_converter(Int8InputsInt4Weights, "my_int8_int4")
