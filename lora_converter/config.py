"""The settings of one LoRA adapter set: the fields of `[lora]` that do not depend on the host.

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ        scaling = alpha / rank, or alpha / √rank with rsLoRA

The string under each field is its `--help` text. Types are real objects, not postponed annotations, because
torchtitan merges job configs by `dataclasses.Field.type`.
"""

import math
from dataclasses import dataclass, field


@dataclass
class LoRAConfig:
    """Low-rank adapters on the linears of a frozen model (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        ValueError: A field is out of its range.
    """

    rank: int = 16
    """Rows of A and columns of B: the rank of the weight update. At least 1."""

    alpha: float = 32.0
    """Numerator of the scaling of the update, alpha / rank. Above 0."""

    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input during training, in [0, 1)."""

    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) (rank-stabilised LoRA, https://arxiv.org/abs/2312.03732)."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """
    Linears that get an adapter: 'all-linear' (every linear but the output head and MoE router gates), a name
    ('wq'), a dotted suffix ('attention.wq') or a glob on the full name ('layers.*.attention.w?').
    Every pattern must match something.
    """

    exclude_modules: list[str] = field(default_factory=list)
    """Linears that get none although target_modules names them. Same patterns; every one must match something."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora.rank = {self.rank!r}: must be an integer of at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha = {self.alpha!r}: must be a finite number above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout!r}: must be at least 0 and below 1.")
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) and p for p in patterns):
                raise ValueError(f"lora.{name} = {patterns!r}: must be a list of non-empty strings.")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one linear, or use 'all-linear'.")

    @property
    def scaling(self) -> float:
        """Factor of the update B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return scaling(self.rank, self.alpha, self.use_rslora)


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
