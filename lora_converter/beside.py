"""Which dims of an adapter's parameters are dims of the weights that they lie beside, for hosts that place parameters.

of a linear    W (out, in)             A (rank, in)              B (out, rank)              a magnitude (out)
of experts     W (experts, out, in)    A (experts, in, rank)     B (experts, out, rank)
"""

from lora_converter.adapted import AdaptedModule
from lora_converter.dora import CHANGE, DoRALinear
from lora_converter.experts import LoRAExperts
from lora_converter.linear import LoRALinear


def shared_dims(module: AdaptedModule) -> dict[str, tuple[str, dict[int, int]]]:
    """Parameter -> its weight, and the weight's dims that it has, too -> which of its own they are.

    Raises:
        ValueError: The module has parameters of another kind.
    """
    if isinstance(module, LoRALinear):
        # A kind names factors of A's and B's shapes in turn.
        shared = {f"{name}.weight": 1 - number % 2 for number, name in enumerate(module.factor_names)}
        shared |= {CHANGE: 0} if isinstance(module, DoRALinear) else {}
        return {name: ("weight", {dim: dim}) for name, dim in shared.items()}
    if isinstance(module, LoRAExperts):
        pairs = {weight: zip(module.peft_factors[weight], (2, 1), strict=True) for weight in module.merged_names()}
        return {name: (weight, {0: 0, dim: 1}) for weight, pair in pairs.items() for name, dim in pair}
    raise ValueError(f"{module.lora_fqn}: this host cannot place {module.adapter_kind} yet.")
