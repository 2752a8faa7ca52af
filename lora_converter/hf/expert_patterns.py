r"""Ranks and alphas of experts that an adapter holds one by one, as few keys that every loader understands.

    model.layers.1.mlp.experts.3.gate_proj     A (r, in), B (out, r): how vLLM and transformers 4 know an expert
    model.layers.1.mlp.experts.gate_up_proj    what PEFT makes of a layer's experts with transformers 5, which stacks
                                               them: rank 2r, A of gate above that of up, B block-diagonal

PEFT then appends `.*\.gate_up_proj` to both tables, with 2r and twice the alpha of the whole adapter. That is wrong
where experts have another rank or alpha, and with rsLoRA, whose scaling goes with √r. A key of ours, found first, says
what is right; it begins with a parenthesis because PEFT sorts its tables when it saves, and `(` comes before `.`.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from lora_converter.config import scaling

logger = logging.getLogger(__name__)

_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The products of an expert, y = down(act(gate(x)) · up(x)), in the names that they have in transformers."""

_EXPERT = re.compile(
    rf"(?P<layer>(.+\.)?experts)\.(?P<expert>\d+)\.(?P<product>{'|'.join(name for s in SPELLINGS for name in s)})"
)

Settings = tuple[int, float]
"""Rank and alpha."""


def split_expert(module: str) -> tuple[str, int, str] | None:
    """The layer's experts, the number and the product of an expert's linear; None for any other module."""
    match = _EXPERT.fullmatch(module)
    return (match["layer"], int(match["expert"]), match["product"]) if match else None


def alpha_for(factor: float, rank: int, *, use_rslora: bool) -> float:
    """The alpha that gives a scaling at a rank, without the last digits that rounding leaves in a short number."""
    alpha = factor / scaling(rank, 1.0, use_rslora)
    short = float(f"{alpha:.9g}")
    return short if math.isclose(short, alpha, rel_tol=1e-12) else alpha


def expert_patterns(
    ranks: Mapping[str, int], alphas: Mapping[str, float], rank: int, alpha: float, *, use_rslora: bool
) -> tuple[tuple[dict[str, int], dict[str, float]], set[str]]:
    """`rank_pattern` and `alpha_pattern` of experts, and the modules that need no key of their own any more.

    Experts of a layer with several ranks or alphas for one product are left out: PEFT cannot stack them.
    """
    found: dict[str, dict[str, set[Settings]]] = defaultdict(lambda: defaultdict(set))
    modules: dict[str, list[str]] = defaultdict(list)
    for module in ranks:
        if parts := split_expert(module):
            found[parts[0]][parts[2]].add((ranks[module], alphas[module]))
            modules[parts[0]].append(module)
    layers = {
        layer: {product: next(iter(settings)) for product, settings in products.items()}
        for layer, products in found.items()
        if all(len(settings) == 1 for settings in products.values())
    }
    alone = len(layers) == len(found) and not any(re.fullmatch(r"(.+\.)?experts\.\w+", module) for module in ranks)
    expected: dict[str, Settings] = {"gate_up_proj": (2 * rank, 2 * alpha)}
    tables: list[dict[str, float]] = [{}, {}]
    for index in (0, 1):
        for number, settings_of in ((r"\.\d+\.", _by_expert), (r"\.", _stacked)):
            wanted = {
                layer: {
                    name: settings[index]
                    for name, settings in settings_of(layer, products, use_rslora).items()
                    if settings[index] != expected.get(name, (rank, alpha))[index]
                }
                for layer, products in layers.items()
            }
            tables[index] |= _keys(wanted, number, alone=alone)
    return ({key: int(own) for key, own in tables[0].items()}, tables[1]), {
        m for layer in layers for m in modules[layer]
    }


def _by_expert(layer: str, products: Mapping[str, Settings], use_rslora: bool) -> dict[str, Settings]:
    return dict(products)


def _stacked(layer: str, products: Mapping[str, Settings], use_rslora: bool) -> dict[str, Settings]:
    """What PEFT's two stacked parameters have to have for each product to keep its scaling."""
    gate, up, down = next(spelling for spelling in SPELLINGS if any(name in products for name in spelling))
    settings = {"down_proj": products[down]} if down in products else {}
    if gate in products and up in products:
        rank = products[gate][0] + products[up][0]
        factors = [scaling(own, alpha, use_rslora) for own, alpha in (products[gate], products[up])]
        if math.isclose(*factors):
            settings["gate_up_proj"] = (rank, alpha_for(factors[0], rank, use_rslora=use_rslora))
        else:
            logger.warning("%s: %s and %s have different scalings: PEFT cannot stack them.", layer, gate, up)
    return settings


def _keys(wanted: Mapping[str, Mapping[str, float]], number: str, *, alone: bool) -> dict[str, float]:
    """One expression for all layers and names that share a value.

    Args:
        wanted: Layer -> name -> value, where it is not the default.
        number: Expression between a layer's experts and a name.
        alone: No other module is named like experts of these layers.
    """
    names: dict[tuple[str, float], list[str]] = defaultdict(list)
    for layer, values in wanted.items():
        for name, value in sorted(values.items()):
            names[layer, value].append(name)
    layers: dict[tuple[tuple[str, ...], float], list[str]] = defaultdict(list)
    for (layer, value), of_layer in names.items():
        layers[tuple(of_layer), value].append(layer)
    table = {}
    for (several, value), where in sorted(layers.items()):
        everywhere = alone and len(where) == len(wanted)
        place = r"(.*\.)?experts" if everywhere else f"({'|'.join(map(_escaped, sorted(where)))})"
        name = f"({'|'.join(several)})" if len(several) > 1 else several[0]
        table[place + number + name] = value
    return table


def _escaped(layer: str) -> str:
    """A layer's experts, under Mixtral's name of either version of transformers."""
    return re.sub(r"\.(mlp|block_sparse_moe)\\\.experts$", r".(mlp|block_sparse_moe)\\.experts", re.escape(layer))


def linears_like_experts(modules: Iterable[str]) -> list[str]:
    """Linears that PEFT takes for routed experts where the model has some, and so are to be named by their weights.

    With transformers 5, which fuses experts, PEFT 0.21 turns the names that experts' products used to have, as target
    modules, into the fused parameters: dense layers and shared experts beside them then get no adapter, without a word.
    """
    return [module for module in modules if module.rpartition(".")[2] in _NAMES_OF_EXPERTS]
