"""The settings of one LoRA adapter set: the fields of `[lora]` that do not depend on the host.

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ        scaling = alpha / rank, or alpha / √rank with rsLoRA

The string under each field is its `--help` text. Types are real objects, not postponed annotations, because
torchtitan merges job configs by `dataclasses.Field.type`.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

C = TypeVar("C", bound="LoRAConfig")


_INITS = re.compile(r"|pissa|pissa_niter_[1-9]\d*|olora")

_OF_ALL = ("dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules", "init")


@dataclass
class LoRAConfig:
    """Low-rank adapters on the linears of a frozen model (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        ValueError: A field is of another type, or out of its range.
    """

    rank: int = 16
    """Rows of A and columns of B: the rank of the weight update. At least 1."""

    alpha: float = 32.0
    """Numerator of the scaling of the update, alpha / rank. Above 0."""

    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input during training, in [0, 1)."""

    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) (rank-stabilised LoRA, https://arxiv.org/abs/2312.03732)."""

    use_dora: bool = False
    """Train a magnitude per output row of each adapted linear beside A and B (DoRA, https://arxiv.org/abs/2402.09353)."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """
    Linears that get an adapter: 'all-linear' (every linear but the output head and MoE router gates), a name
    ('wq'), a dotted suffix ('attention.wq') or a glob on the full name ('layers.*.attention.w?').
    'experts' (or '*.experts.w1', 'layers.3.moe.experts') names routed experts; other patterns never reach them.
    Every pattern must match something.
    """

    exclude_modules: list[str] = field(default_factory=list)
    """Linears that get none although target_modules names them. Same patterns; every one must match something."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """
    Linears with another rank: a table from a pattern, as in target_modules, to a rank. Each must match an adapted
    linear, and no two may give one linear different ranks.
    """

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Linears with another alpha, in the same way."""

    init: str = ""
    """
    How the factors begin: "" (A random, B zero), "pissa" (the weight's largest singular vectors), "pissa_niter_4" (the
    same by a randomised SVD of 4 iterations), or "olora" (the first rows of its QR decomposition). What is added is
    then the scaled difference to the first product, so that training starts at the base all the same.
    """

    expert_rank: int = 0
    """Rank of adapters on routed experts, of which there are many; that of `rank` if 0."""

    train_also: list[str] = field(default_factory=list)
    """
    Modules whose own weights train in full size beside the adapters: 'tok_embeddings', 'output', 'norm',
    'layers.*.attention_norm'. Same patterns, over all modules with weights of their own; each must match something.
    """

    train_also_lr: float = 0.0
    """
    Learning rate of the weights of train_also and of the rows of new_tokens, which have no weight decay; that of the
    optimizer if 0.
    """

    new_tokens: list[str] = field(default_factory=list)
    """
    Tokens that are added to the tokenizer, and whose rows of the embedding and of the output head train; of one that
    the tokenizer has already the rows train, too. Rows that the base has not begin at the mean of those it has.
    """

    def __post_init__(self) -> None:
        _check_rank("lora.rank", self.rank)
        _check_alpha("lora.alpha", self.alpha)
        if isinstance(self.expert_rank, bool) or not isinstance(self.expert_rank, int) or self.expert_rank < 0:
            raise ValueError(f"lora.expert_rank = {self.expert_rank!r}: must be an integer of at least 1, or 0.")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout!r}: must be at least 0 and below 1.")
        if not isinstance(self.init, str) or not _INITS.fullmatch(self.init):
            raise ValueError(
                f"lora.init = {self.init!r}: must be '', 'pissa', 'pissa_niter_N' with a number, or 'olora'."
            )
        if self.init and self.use_dora:
            raise ValueError(
                f"lora.init = {self.init!r} and lora.use_dora = true: factors that begin at the weight have no "
                "magnitude here. Leave lora.init out, or set lora.use_dora = false."
            )
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"lora.{name} = {getattr(self, name)!r}: must be true or false.")
        if not is_number(self.train_also_lr) or not (math.isfinite(self.train_also_lr) and self.train_also_lr >= 0):
            raise ValueError(f"lora.train_also_lr = {self.train_also_lr!r}: must be a finite number of at least 0.")
        for name in ("target_modules", "exclude_modules", "train_also", "new_tokens"):
            patterns = getattr(self, name)
            if not isinstance(patterns, list) or not all(isinstance(p, str) and p for p in patterns):
                raise ValueError(f"lora.{name} = {patterns!r}: must be a list of non-empty strings.")
        if twice := sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1}):
            raise ValueError(f"lora.new_tokens: {', '.join(map(repr, twice))} stands twice.")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one linear, or use 'all-linear'.")
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            table = getattr(self, name)
            if not isinstance(table, dict) or not all(isinstance(p, str) and p for p in table):
                raise ValueError(f"lora.{name} = {table!r}: must be a table from patterns to numbers.")
            for pattern, value in table.items():
                check(f"lora.{name}[{pattern!r}]", value)

    @property
    def scaling(self) -> float:
        """Factor of the update B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return scaling(self.rank, self.alpha, self.use_rslora)

    def of_plain(self: C) -> C:
        """The settings of what an adapter with `init` is exported as: a plain one of twice the rank, scaled alike."""
        if not self.init:
            return self
        factor = math.sqrt(2) if self.use_rslora else 2.0
        return replace(
            self,
            init="",
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
            alpha_pattern={pattern: factor * alpha for pattern, alpha in self.alpha_pattern.items()},
        )

    def of_one(self, *, rank: int, alpha: float) -> "LoRAConfig":
        """The settings of a single adapted module, for which the patterns have been looked up."""
        own = {name: getattr(self, name) for name in _OF_ALL}
        return LoRAConfig(rank=rank, alpha=alpha, **own)


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def is_number(value: Any) -> bool:
    """Whether a setting is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} = {value!r}: must be an integer of at least 1.")


def _check_alpha(option: str, value: Any) -> None:
    if not is_number(value) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{option} = {value!r}: must be a finite number above 0.")
