"""torchtitan's routed experts with adapters: its two classes of experts, on its two paths.

One path loops over experts, the other takes all of them in one grouped product. Either way a product of torchtitan's is
replaced by one with its update, and the rest is torchtitan's: how rows come to experts and back, what stands between
the products, and that the grouped path computes in bf16.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.models.moe.moe import GroupedExperts
from torchtitan.models.moe.utils import indices_padding_wrapper

from lora_converter.experts import LoRAExperts
from lora_converter.tensors import local_part

Tensor = torch.Tensor


class LoRAGroupedExperts(LoRAExperts):
    """SwiGLU experts: w2(silu(w1(x)) · w3(x))."""

    expert_weights = ("w1", "w2", "w3")
    use_grouped_mm: bool

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """x: (rows, dim), sorted by expert, of which the last may be padding -> (rows, dim)."""
        if not self.is_active:
            return cast(Tensor, super().forward(x, num_tokens_per_expert))
        if not self.use_grouped_mm:
            return self._one_by_one(x, num_tokens_per_expert.tolist())
        run: Callable[..., Tensor] = self._grouped
        if not _is_expert_parallel(self.w1):  # under EP the rows come padded
            run = indices_padding_wrapper(run)
        weights = (local_part(self.get_parameter(name)) for name in self.expert_weights)
        return run(*weights, x, num_tokens_per_expert)

    def _one_by_one(self, x: Tensor, counts: list[int]) -> Tensor:
        w1, w2, w3 = (self.per_expert(name) for name in self.expert_weights)
        rows = sum(counts)
        parts = x[:rows].split(counts)
        outs = [w2(e, F.silu(w1(e, part)) * w3(e, part)) for e, part in enumerate(parts)]
        return torch.cat([*outs, outs[0].new_zeros(x.shape[0] - rows, outs[0].shape[-1])])

    def _grouped(self, w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """With torchtitan's arguments; the weights are this module's own."""
        offsets = torch.cumsum(num_tokens_per_expert, dim=0, dtype=torch.int32)
        rows = x.bfloat16()
        h = F.silu(self.grouped_product("w1", rows, offsets)) * self.grouped_product("w3", rows, offsets)
        return self.grouped_product("w2", h, offsets).type_as(x)


def _is_expert_parallel(weight: Any) -> bool:
    return isinstance(weight, DTensor) and "ep" in (weight.device_mesh.mesh_dim_names or ())


EXPERT_CLASSES: dict[type[nn.Module], type[LoRAExperts]] = {GroupedExperts: LoRAGroupedExperts}
"""What `apply_lora` is told of torchtitan's experts."""
