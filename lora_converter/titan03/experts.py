"""torchtitan 0.3's routed experts with adapters: always grouped products, in bf16."""

from typing import cast

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.module import Module

from lora_converter.experts import LoRAExperts
from lora_converter.titan03.names import canonical_name
from lora_converter.titans.experts import SwiGLUExperts, Tensor


class LoRAGroupedExperts(LoRAExperts, SwiGLUExperts, Module):
    """deepseek_v3's and qwen3's."""

    expert_weights = ("w1_EFD", "w2_EDF", "w3_EFD")
    whole_beside_shards: tuple[str, ...] = ()
    """Factors that stay whole where tensor parallelism shards their weights."""
    tp_mesh: DeviceMesh | None = None

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        forward = self.grouped if self.is_computed_here else super().forward
        return cast(Tensor, forward(x_RD, num_tokens_per_expert_E))

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        super().parallelize(parallel_dims)
        self.tp_mesh = parallel_dims.get_optional_mesh("tp")

    def whole_over(self) -> dict[str, DeviceMesh]:
        return {} if self.tp_mesh is None else dict.fromkeys(self.whole_beside_shards, self.tp_mesh)

    def canonical_weight_name(self, weight: str) -> str:
        return canonical_name(f"{self.lora_fqn}.{weight}")


EXPERT_CLASSES: dict[type[nn.Module], type[LoRAExperts]] = {GroupedExperts: LoRAGroupedExperts}
"""What `apply_lora` is told of torchtitan's experts."""
