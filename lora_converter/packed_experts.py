"""The products of routed experts, each with weights that may be packed.

    y_e = x_e W_eᵀ        per expert e and product;  W (experts, out_features, in_features)

A host derives a class from `RoutedExperts` that says what the weights are called and has the forward: how rows come to
experts, and what stands between the products, is the host's affair. Its class is put on experts whose weights are
packed (`experts.py::pack_experts`), and the host's class of experts with adapters derives from it as well.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from lora_converter.grouped import grouped_product
from lora_converter.packed_module import PackedModule
from lora_converter.packed_ops import packed_linear
from lora_converter.tensors import local_part

Tensor = torch.Tensor


class RoutedExperts(PackedModule):
    """Experts whose products are computed here. A host derives from it."""

    expert_weights: ClassVar[tuple[str, ...]] = ()
    """Weights that can be packed and adapted, each (experts, out_features, in_features)."""

    @property
    def is_computed_here(self) -> bool:
        """Whether the host's own forward would not do."""
        return bool(self.packed_format)

    def packed_names(self) -> tuple[str, ...]:
        return self.expert_weights if self.packed_format else ()

    def per_expert(self, weight: str) -> Callable[[int, Tensor], Tensor]:
        """A product as a function of an expert of this rank and its rows, x_e (rows, in_features)."""
        weights, form = local_part(self.get_parameter(weight)).unbind(), self.packed_format
        return lambda e, x: packed_linear(x, weights[e], form=form) if form else F.linear(x, weights[e])

    def grouped_product(self, weight: str, x: Tensor, offsets: Tensor) -> Tensor:
        """A product of all experts of this rank in x's dtype: x (rows, in_features), sorted by expert.

        Args:
            offsets: Where each expert's rows end, int32, (experts of this rank).
        """
        return grouped_product(x, self.base_beside(weight, x), offsets, form=self.packed_format)

    def base_beside(self, weight: str, x: Tensor) -> Tensor:
        """This rank's part of a weight, packed or of x's dtype."""
        base = local_part(self.get_parameter(weight))
        return base if self.packed_format else base.to(x.dtype)
