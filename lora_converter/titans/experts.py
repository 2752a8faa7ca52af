"""torchtitan's routed experts, packed and with adapters, where all of them are taken in one grouped product.

A product of torchtitan's is replaced by one with a packed weight or with an update, and the rest is torchtitan's: how
rows come to experts and back, what stands between the products, and that they are computed in bf16.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from lora_converter.packed_experts import RoutedExperts

Tensor = torch.Tensor

Product = Callable[[str, Tensor], Tensor]
"""A weight's name and rows -> their product, each row with its own expert's weight."""

PerRow = Callable[[Tensor], Tensor]
"""What each expert adds to its rows, (experts, features) -> what is added, to fit a product."""


class TitanExperts(RoutedExperts):
    """A class of torchtitan's says, in `compute`, what its experts make of their rows."""

    def compute(self, x: Tensor, product: Product, per_row: PerRow) -> Tensor:
        """x: (rows, dim), one expert's or all experts' -> (rows, dim)."""
        raise NotImplementedError

    def grouped(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """x: (rows, dim), sorted by expert, of which the last may be padding -> (rows, dim), computed in bf16."""
        offsets = torch.cumsum(num_tokens_per_expert, dim=0, dtype=torch.int32)

        def per_row(values: Tensor) -> Tensor:
            # Rows after the last expert's get its values: they are unwritten, and nobody's.
            rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
            return values.bfloat16()[torch.bucketize(rows, offsets[:-1], right=True)]

        return self.compute(x.bfloat16(), partial(self.grouped_product, offsets=offsets), per_row)


class SwiGLUExperts(TitanExperts):
    """deepseek_v3's, qwen3's and llama4's: w2(silu(w1(x)) · w3(x))."""

    def compute(self, x: Tensor, product: Product, per_row: PerRow) -> Tensor:
        w1, w2, w3 = self.expert_weights
        return product(w2, F.silu(product(w1, x)) * product(w3, x))

    def grouped(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return super().grouped(x, num_tokens_per_expert).type_as(x)
