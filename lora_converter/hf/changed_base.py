"""PEFT's PiSSA and OLoRA adapters as it saves them by itself: factors A, B of a base that PEFT changed.

    training    W' = W - s B₀ A₀, with A₀, B₀ of W's decomposition; y = x W'ᵀ + s · x (B A)ᵀ
    the file    A, B and `init_lora_weights`; neither A₀, B₀ nor W'
    loading     `PeftModel.from_pretrained` decomposes the base again, changes it, and then loads A and B

So the same is done here (PEFT 0.21.2): A₀ and B₀ are computed again, from the base that is given, and s (B A - B₀ A₀)
is what the adapter adds to it: a plain one of twice the rank. PEFT rounds W' to the base's dtype; here nothing is
rounded before the sum is. The base must be PEFT's, in the same dtype: another weight has another decomposition.

Where that cannot be, the adapter is refused: a randomised decomposition (`pissa_niter_N`) has no seed in PEFT and comes
out otherwise each time; of OLoRA on transformers' `Conv1D` PEFT decomposes the transposed weight, whose factors do not
fit; under DoRA the magnitudes are the changed base's; a changed head is stored beside, and changes a tied embedding.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_converter.config import LoRAConfig
from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.naming import HFLinear
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.saved_modules import is_saved
from lora_converter.offset import initial_factors, plain_factors

logger = logging.getLogger(__name__)

_CONVERT = "Let PEFT convert it where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)."

_HEADS = {"lm_head", "embed_out", "output"}

Weights = Mapping[str, tuple[Callable[[], torch.Tensor], bool]]
"""Module -> what reads its weight, and whether that is (in_features, out_features)."""


def init_of(config: Mapping[str, Any]) -> str:
    """`[lora] init` of what `adapter_config.json` says; empty for factors of a base that nobody changed."""
    said = config.get("init_lora_weights")
    return str(said).lower() if is_changed_base(said) else ""


def is_changed_base(value: Any) -> bool:
    """Whether a value of `init_lora_weights` is one whose changed base can be had again. PEFT's own spellings."""
    return isinstance(value, str) and (value == "pissa" or value.lower() == "olora")


def check_init(adapter: PeftAdapter, what: str) -> None:
    """Refuses what belongs to a changed base that cannot be had again.

    Raises:
        ValueError: DoRA, routed experts, an output head, or copies of changed weights.
    """
    if not adapter.init:
        return
    copies = [key for key in adapter.base_weights if not is_saved(key, adapter.modules_to_save)]
    stacked = [m for m, (a, _) in adapter.factors.items() if a.ndim != 2 or split_expert(m)]
    problems = {
        "use_dora = true, whose magnitudes are the changed base's": bool(adapter.magnitudes),
        f"the routed experts {', '.join(stacked[:3])}": bool(stacked),
        "target_parameters": bool(adapter.target_parameters) and not stacked,
        "an output head, whose change reaches a tied embedding": any(
            module.rpartition(".")[2] in _HEADS for module in adapter.factors
        ),
        f"copies of changed weights, {', '.join(copies)}": bool(copies),
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise ValueError(
            f"{what}: init_lora_weights = {adapter.init!r}: the factors belong to a base that PEFT changed, which "
            f"cannot be computed again with {'; '.join(found)}. {_CONVERT}"
        )


def check_same_matrix(linear: HFLinear, init: str, out_features: int) -> None:
    """Refuses a linear whose weight is another matrix in the host's model, with another decomposition.

    Rows may be in any order, and PiSSA's columns: factors change places with them.

    Args:
        out_features: Of the host's.

    Raises:
        ValueError: It is a part of the host's, or of OLoRA has its columns in another order.
    """
    is_part = linear.rows is not None and len(linear.rows) != out_features
    if init and (is_part or (linear.columns is not None and init == "olora")):
        raise ValueError(
            f"{linear.name} began at its weight (init_lora_weights = {init!r}), which is another matrix in this model, "
            f"with another decomposition. {_CONVERT}"
        )


def check_way_round(adapter: PeftAdapter, transposed: Sequence[str], what: str) -> None:
    """Refuses OLoRA on weights that are stored as (in_features, out_features).

    Raises:
        ValueError: There are such; all are named.
    """
    if transposed and adapter.init == "olora":
        raise ValueError(
            f"{what}: init_lora_weights = 'olora' on {', '.join(transposed)}, whose weights are stored as (in, out): "
            "PEFT decomposes them the other way round, and no factors of it fit them."
        )


def beside_base(adapter: PeftAdapter, weights: Weights, what: str, *, base_as: str = "") -> PeftAdapter:
    """The adapter as a plain one of twice its rank, beside the base as it is.

    Args:
        base_as: See `merge_directories`.

    Raises:
        ValueError: OLoRA on a weight that is stored transposed, or packed weights.
    """
    if not adapter.init:
        return adapter
    if base_as:
        raise ValueError(
            f"{what}: init_lora_weights = {adapter.init!r}: PEFT changed the base's own weights, not those packed as "
            f"{base_as}. Leave --base-as out."
        )
    check_way_round(adapter, [module for module, (_, is_transposed) in weights.items() if is_transposed], what)
    logger.info("Computing again what %d weights began at (%s), as PEFT does.", len(weights), adapter.init)
    factors = dict(adapter.factors)
    for module, (read, is_transposed) in weights.items():
        a, b = (factor.float() for factor in factors[module])
        alpha = adapter.alpha_of(module)
        config = LoRAConfig(rank=adapter.rank_of(module), alpha=alpha, use_rslora=adapter.use_rslora, init=adapter.init)
        weight = read()
        factors[module] = plain_factors(
            a, b, *initial_factors(weight.t() if is_transposed else weight, config, name=module)
        )
    times = math.sqrt(2) if adapter.use_rslora else 2.0
    return replace(
        adapter,
        init="",
        factors=factors,
        rank=2 * adapter.rank,
        alpha=times * adapter.alpha,
        alphas={module: times * alpha for module, alpha in adapter.alphas.items()},
    )
