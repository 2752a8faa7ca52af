"""torchtitan's routed experts, packed and with adapters: its two classes of experts, on its two paths.

One path takes all experts in one grouped product (`titans/experts.py`), the other loops over them. The products alone
are replaced there, too.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts, ScaleBiasForward, swiglu
from torchtitan.models.moe.moe import GroupedExperts
from torchtitan.models.moe.utils import indices_padding_wrapper

from lora_converter.experts import LoRAExperts
from lora_converter.tensors import local_part
from lora_converter.titans.experts import PerRow, Product, SwiGLUExperts, TitanExperts

Tensor = torch.Tensor


class BothPaths(TitanExperts):
    """The grouped path, and the one that loops over experts."""

    use_grouped_mm: bool

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """x: (rows, dim), sorted by expert, of which the last may be padding -> (rows, dim)."""
        if not self.is_computed_here:
            return cast(Tensor, super().forward(x, num_tokens_per_expert))
        if not self.use_grouped_mm:
            return self._one_by_one(x, num_tokens_per_expert.tolist())
        weight = self.get_parameter(self.expert_weights[0])
        if _degree(weight, "ep") is not None:  # the rows come padded
            return self.grouped(x, num_tokens_per_expert)
        # Of weights it asks the first, for the number of experts.
        padded: Callable[..., Tensor] = indices_padding_wrapper(lambda w1, w2, w3, *rows: self.grouped(*rows))
        return padded(local_part(weight), None, None, x, num_tokens_per_expert)

    def _one_by_one(self, x: Tensor, counts: list[int]) -> Tensor:
        products = {name: self.per_expert(name) for name in self.expert_weights}

        def one(e: int, rows: Tensor) -> Tensor:
            return self.compute(rows, lambda name, x: products[name](e, x), lambda values: values[e])

        rows = sum(counts)
        outs = [one(e, part) for e, part in enumerate(x[:rows].split(counts))]
        return torch.cat([*outs, outs[0].new_zeros(x.shape[0] - rows, outs[0].shape[-1])])


class PackedGroupedExperts(BothPaths, SwiGLUExperts):
    """deepseek_v3's, qwen3's and llama4's."""

    expert_weights = ("w1", "w2", "w3")


class PackedGptOssExperts(BothPaths):
    """gpt_oss's: mlp2(swiglu(mlp1(x))), where mlp1's rows are gate and up in turn, and each has a frozen bias."""

    expert_weights = ("mlp1_weight", "mlp2_weight")
    swiglu_limit: float

    def compute(self, x: Tensor, product: Product, per_row: PerRow) -> Tensor:
        biases = [local_part(self.get_parameter(name)) for name in ("mlp1_bias", "mlp2_bias")]
        h = swiglu(product("mlp1_weight", x) + per_row(biases[0]), limit=self.swiglu_limit)
        # Every rank of TP adds its bias to a partial sum.
        tp = _degree(self.get_parameter("mlp1_weight"), "tp") or 1
        return product("mlp2_weight", h) + per_row(ScaleBiasForward.apply(biases[1], tp))


class LoRAGroupedExperts(LoRAExperts, PackedGroupedExperts):
    """The first, with adapters."""


class LoRAGptOssExperts(LoRAExperts, PackedGptOssExperts):
    """The second."""


def _degree(weight: Tensor, axis: str) -> int | None:
    """How many ranks share a weight over a named axis; None if it has no such axis."""
    if not isinstance(weight, DTensor):
        return None
    names = weight.device_mesh.mesh_dim_names or ()
    return weight.device_mesh.size(names.index(axis)) if axis in names else None


EXPERT_CLASSES: dict[type[nn.Module], type[LoRAExperts]] = {
    GroupedExperts: LoRAGroupedExperts,
    GptOssGroupedExperts: LoRAGptOssExperts,
}
"""What `apply_lora` is told of torchtitan's experts."""
