"""An adapter in Hugging Face's names: what a PEFT directory holds, in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_converter.config import scaling
from lora_converter.hf.aliases import Aliases
from lora_converter.hf.folder import FLOATS
from lora_converter.hf.packed_base import PackedBase
from lora_converter.hf.peft_config import PEFT_VERSION
from lora_converter.hf.peft_patterns import patterns_of
from lora_converter.hf.stacked import is_weight, stacked_names
from lora_converter.hf.trained_tokens import FIELD, TokenRows, to_setting
from lora_converter.tensors import is_finite


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in Hugging Face's names.

    Attributes:
        factors: Module -> (A, B), shapes (rank, in_features) and (out_features, rank). Each has a rank of its own. Of
            stacked experts the parameter's full name -> A (experts, rank, P), B (experts, Q, rank), where P and Q are
            what PEFT's file has there; `experts.py` says which is which.
        rank: Of the modules, if they have one; else the most common.
        alpha: Of the modules that `alphas` does not name.
        target_modules: As PEFT matches them: whole names, or last parts of names.
        base_model: Where the base is, for people and loaders; may be empty.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: list[str]
    base_model: str = ""
    fan_in_fan_out: bool = False
    """The weights of the base are said to be (in_features, out_features): transformers' GPT-2."""
    base_fingerprint: str = ""
    """Of the base in the trainer's names (`fingerprint.py`), in the header of the weights; empty if not known."""
    packed: PackedBase | None = None
    """Which weights of the base the training had packed, likewise; None if it had none, or if that is not known."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Module -> alpha, of those with another one than `alpha`."""
    target_parameters: list[str] = field(default_factory=list)
    """Stacked experts' parameters, and linears, named by their weights, that PEFT would mistake for experts'."""
    base_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """
    Key -> weight that PEFT stores beside the factors: of modules that were trained in full, or the base's of an
    embedding, a head or a resized vocabulary.
    """
    modules_to_save: list[str] = field(default_factory=list)
    """Modules of which `base_weights` has what was trained, as PEFT matches them: ends of names."""
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    """Module -> DoRA's magnitude of each row, (out_features), of all modules or of none."""
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    """Embedding or head -> rows of single tokens that were trained."""
    init: str = ""
    """Other than empty: the factors belong to a base that PEFT changed, and are no update of it (`changed_base.py`)."""
    peft_version: str = PEFT_VERSION
    """Whose rules tell which way round factors of stacked experts are; empty of a file that does not say."""

    @property
    def scaling(self) -> float:
        """Factor of B A of the modules that have the adapter's own rank and alpha."""
        return scaling(self.rank, self.alpha, self.use_rslora)

    @property
    def settings(self) -> dict[str, Any]:
        """What a job on this adapter has in `[lora]`, beside patterns and targets."""
        use_dora = bool(self.magnitudes)
        own = {"rank": self.rank, "alpha": self.alpha, "use_rslora": self.use_rslora}
        return {**own, "use_dora": use_dora, "init": self.init}

    @property
    def matrices(self) -> int:
        """How many matrices have an update: linears, and each expert's of a stack."""
        return sum(a.shape[0] if a.ndim == 3 else 1 for a, _ in self.factors.values())

    def renamed(self, known: Aliases) -> "PeftAdapter":
        """The same adapter under the names that its modules have here; what is not found keeps its own.

        Raises:
            ValueError: See `Aliases.find_all`.
        """
        found = known.find_all(self.factors)
        if all(module == name for module, name in found.items()):
            return self
        return replace(
            self,
            factors={found.get(module, module): pair for module, pair in self.factors.items()},
            alphas={found.get(module, module): alpha for module, alpha in self.alphas.items()},
            magnitudes={found.get(module, module): own for module, own in self.magnitudes.items()},
        )

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return self.factors[module][0].shape[-2]

    def alpha_of(self, module: str) -> float:
        """The alpha of one module."""
        return self.alphas.get(module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """Factor of one module's B A."""
        return scaling(self.rank_of(module), self.alpha_of(module), self.use_rslora)

    def delta_weight(self, module: str) -> torch.Tensor:
        """The update of a module's weight, in the weight's own shape as `fan_in_fan_out` has it, fp32.

        Of stacked experts (experts, Q, P).
        """
        transposed = self.fan_in_fan_out and self.factors[module][0].ndim == 2
        left, right = delta_factors(*self.factors[module], transposed=transposed)
        return self.scaling_of(module) * (left @ right)

    def check_finite(self, what: str) -> None:
        """Refuses factors that hold nan or inf.

        Raises:
            ValueError: Some do; all are named.
        """
        if broken := self.not_finite():
            raise ValueError(f"{what}: the factors of {', '.join(broken)} hold nan or inf.")

    def not_finite(self) -> list[str]:
        """The modules whose factors, or magnitudes, hold nan or inf."""
        of_rows = {module: [own] for module, own in self.magnitudes.items()}
        return [m for m, pair in self.factors.items() if not all(map(is_finite, [*pair, *of_rows.get(m, [])]))]


def delta_factors(a: torch.Tensor, b: torch.Tensor, *, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product, scaled, is the update, fp32; rows of the first give its rows. Experts come first.

    Args:
        transposed: The weight is (in_features, out_features), or (experts, P, Q).
    """
    a, b = a.float(), b.float()
    return (a.mT, b.mT) if transposed else (b, a)


def check_factors(adapter: PeftAdapter, ranks: Mapping[str, int], what: str) -> None:
    """Refuses factors that do not fit together, or have another rank than `ranks` gives to their module."""
    for module, (a, b) in adapter.factors.items():
        rank = ranks[module]
        shapes = f"{module}: lora_A is {tuple(a.shape)}, lora_B is {tuple(b.shape)}"
        fit = a.ndim == b.ndim and a.shape[-2] == b.shape[-1] == rank and a.shape[:-2] == b.shape[:-2]
        if a.ndim not in (2, 3) or not fit:
            why = ""
            if rank != adapter.rank:
                why += f" It is rank_pattern that gives it r = {rank}: the first key that matches counts, as in PEFT."
            raise ValueError(f"{what}: {shapes}; with r = {rank} they must be (r, in) and (out, r).{why}")
        if not {a.dtype, b.dtype} <= FLOATS.keys():
            raise ValueError(f"{what}: {module}: factors are {a.dtype} and {b.dtype}; they must be floating point.")


def base_weights_in_training(what: str, base_weights: Iterable[str]) -> str:
    """What to say of an adapter that brings weights of the base where adapters alone are read."""
    return (
        f"{what} brings {', '.join(base_weights)} of another base than this one: its embedding was trained, or its "
        "vocabulary resized. Merge it first (`lora-converter merge`), and train on the result."
    )


def config_of(adapter: PeftAdapter) -> dict[str, Any]:
    """`adapter_config.json`: every field that a reader may look at; PEFT fills in its defaults for the rest."""
    ranks = {module: adapter.rank_of(module) for module in adapter.factors}
    alphas = {module: adapter.alpha_of(module) for module in adapter.factors}
    stacked = stacked_names(adapter.factors)
    parameters = [*filter(is_weight, adapter.target_parameters), *stacked]
    rank_pattern, alpha_pattern = patterns_of(
        ranks, alphas, adapter.rank, adapter.alpha, use_rslora=adapter.use_rslora, as_parameters=parameters
    )
    only_if_on = {
        "alpha_pattern": {key: _short_number(alpha) for key, alpha in alpha_pattern.items()},
        "rank_pattern": rank_pattern,
        "target_parameters": sorted(parameters),
    }
    return {
        **{name: value for name, value in only_if_on.items() if value},
        "base_model_name_or_path": adapter.base_model or None,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": adapter.init or True,
        "lora_alpha": _short_number(adapter.alpha),
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "modules_to_save": sorted(adapter.modules_to_save) or None,
        "peft_type": "LORA",
        "peft_version": adapter.peft_version if stacked else PEFT_VERSION,
        "r": adapter.rank,
        "target_modules": sorted(adapter.target_modules),
        "task_type": "CAUSAL_LM",
        **({FIELD: to_setting(adapter.token_rows)} if adapter.token_rows else {}),
        "use_dora": bool(adapter.magnitudes),
        "use_rslora": adapter.use_rslora,
    }


def _short_number(value: float) -> float:
    """As an integer where it is one, as PEFT writes it."""
    return int(value) if value == int(value) else value
