"""What a merge will do, before a byte is written: which weight of the base gets which update, and what else changes.

Foreign files name one module in several ways, store copies of base weights beside the factors, tie the output head to
the embedding, and say of a weight's orientation what is not so. All of that is settled here, against the base's own
headers and `config.json`, or refused by name.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from safetensors import safe_open

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.base_as import CONV1D_MODELS, AsPacked, check_base_as, is_conv1d, weights_as
from lora_converter.hf.expert_layouts import layout_of, stored_experts
from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.experts import fit_experts
from lora_converter.hf.folder import Entry, ModelFolder
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.saved_modules import is_same_weight, is_saved
from lora_converter.hf.stacked import OUTER

logger = logging.getLogger(__name__)

_HEADS = {"lm_head", "embed_out", "output"}
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}

_PARTS = re.compile(r"(\.weight|_blocks)$")
"""What the key of a weight has after the name that adapters go by."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight.

    Attributes:
        module: Of the adapter.
        transposed: The weight is (in_features, out_features); of stacked experts, A goes over the weight's second dim.
    """

    module: str
    transposed: bool


@dataclass
class MergePlan:
    """The merged model, as changes to the base's folder.

    Attributes:
        adapter: Its name in messages.
        peft: The adapter, its experts in the form in which the base stores them.
        updates: Key of the merged model -> its update.
        replaced: Key -> weight that the adapter brings in place of the base's.
        added: Key that the base has not -> key whose weight it starts from and beside which it is written.
        untied: The output head has a weight of its own from now on.
        packed: Key -> how the weight was packed in the training, of those that are merged as they were there.
    """

    adapter: str
    peft: PeftAdapter
    updates: dict[str, Update] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    untied: bool = False
    packed: dict[str, AsPacked] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int | None:
        """Of the merged model, where the adapter brings an embedding."""
        names = _HEADS | _EMBEDDINGS
        sizes = {v.shape[0] for key, v in self.replaced.items() if _last(key.removesuffix(".weight")) in names}
        return sizes.pop() if len(sizes) == 1 else None


def plan_merge(base: ModelFolder, peft: PeftAdapter, adapter: str, *, base_as: str = "") -> MergePlan:
    """Settles all of it.

    Args:
        base_as: See `merge_directories`.

    Raises:
        ValueError: Every module and weight that does not fit, with the reason.
    """
    if base_as:
        check_base_as(base, base_as, peft.packed)
    keys, kind = _Keys(base), str(base.config.get("model_type", ""))
    try:
        peft = fit_experts(peft, {key: entry.shape for key, (_, entry) in base.weights.items()}, model_type=kind)
    except ValueError as e:
        raise ValueError(f"The adapter in {adapter} does not fit the base in {base.path}: {e}.") from None
    plan, problems = MergePlan(adapter, peft), []
    for module, (a, b) in peft.factors.items():
        try:
            key = keys.of_module(module, [*a.shape[:-2], b.shape[-2], a.shape[-1]], plan)
            transposed = _is_transposed(base, peft, module, keys.shape(key, plan))
        except ValueError as e:
            problems.append(str(e))
            continue
        if key in plan.updates:
            problems.append(f"{module} and {plan.updates[key].module} are both {key} of the base")
        plan.updates[key] = Update(module, transposed)
    for key, value in peft.base_weights.items():
        try:
            keys.settle_copy(key, value, plan)
        except ValueError as e:
            problems.append(str(e))
    if problems:
        raise ValueError(f"The adapter in {adapter} does not fit the base in {base.path}: {'; '.join(problems)}.")
    _keep_tied_head(base, plan)
    heads = [key for key in (*plan.updates, *plan.replaced) if _last(key.removesuffix(".weight")) in _HEADS]
    plan.untied = plan.untied or bool(heads and _is_tied(base))
    if base_as:
        linears = {key: update.transposed for key, update in plan.updates.items() if len(keys.shape(key, plan)) == 2}
        packed = weights_as(base, base_as, peft.packed, transposed=linears)
        plan.packed = {key: as_packed for key, as_packed in packed.items() if key not in plan.replaced}
    return plan


def _keep_tied_head(base: ModelFolder, plan: MergePlan) -> None:
    """An embedding that PEFT trained in full is a copy: an output head that is tied to the base's keeps that."""
    brought = {_last(key.removesuffix(".weight")): key for key in plan.replaced}
    embedding = next((key for last, key in brought.items() if last in _EMBEDDINGS), None)
    if embedding and is_saved(embedding, plan.peft.modules_to_save) and _is_tied(base) and not _HEADS & brought.keys():
        plan.added["lm_head.weight"], plan.untied = embedding, True


def without_weight(base: ModelFolder, modules: Iterable[str]) -> list[str]:
    """The modules that cannot be merged into a base: their weights are not in it, or quantized.

    An expert's weight may be a part of a stack, and a stack's may be the weights of single experts.
    """
    keys = _Keys(base)
    found = {module: keys.find(module) or keys.of_expert(module) or keys.embedding_of(module) for module in modules}
    return [module for module, key in found.items() if key is None or not base.weights[key][1].is_float]


class _Keys:
    """The base's keys, found by an adapter's modules."""

    def __init__(self, base: ModelFolder):
        self._base = base
        kind = str(base.config.get("model_type", ""))
        self._keys = {
            _PARTS.sub("", key): key for key, (_, entry) in base.weights.items() if _holds_matrices(key, entry)
        }
        self._aliases = Aliases(self._keys, kind)
        self._embeddings = [key for module, key in self._keys.items() if _last(module) in _EMBEDDINGS]
        self._layers = stored_experts({key: entry.shape for key, (_, entry) in base.weights.items()}, layout_of(kind))
        self._owners = Aliases(self._layers, kind)

    def shape(self, key: str, plan: MergePlan) -> list[int]:
        """Of a weight of the merged model before its update."""
        return self._base.weights[plan.added.get(key, key)][1].shape

    def of_module(self, module: str, here: list[int], plan: MergePlan) -> str:
        """The key of the weight that a module's update, of shape `here`, is added to."""
        key = self.find(module)
        if key is None:
            key, embedding = f"{module}.weight" if len(here) == 2 else module, self.embedding_of(module)
            if embedding is None:
                raise ValueError(f"{key} is not in the base")
            plan.added[key], plan.untied = embedding, True
            logger.info("%s is tied to %s: it gets a weight of its own.", key, embedding)
        entry = self._base.weights[plan.added.get(key, key)][1]
        if not entry.is_float:
            raise ValueError(f"{key} is quantized ({entry.dtype}); merge into an unquantized copy of the base")
        if entry.shape not in (here, [*here[:-2], here[-1], here[-2]]):
            raise ValueError(f"{key} is {tuple(entry.shape)} in the base and {tuple(here)} in the adapter")
        return key

    def find(self, module: str) -> str | None:
        """The key of a module's weight, under whatever name."""
        name = self._aliases.find(module)
        return None if name is None else self._keys[name]

    def of_expert(self, module: str) -> str | None:
        """The key of a weight that an expert's is stored in, or one of those that a stack's is stored in."""
        parts = split_expert(module)
        owner = parts[0] if parts else module.rpartition(".")[0]
        layer = self._layers.get(self._owners.find(owner) or "")
        if layer is None:
            return None
        return self.find(f"{layer.name}.0.{layer.spelling[2]}" if layer.spelling else f"{layer.name}.{OUTER}")

    def settle_copy(self, key: str, value: torch.Tensor, plan: MergePlan) -> None:
        """Drops a copy of a base weight that equals it, and takes another one in its place."""
        owner, _, last = key.rpartition(".")
        name = f"{weight.rpartition('.')[0]}.{last}" if (weight := self.find(owner)) else key
        found = name if name in self._base.weights else None
        source = found or self.embedding_of(key.removesuffix(".weight"))
        if source is None:
            raise ValueError(f"{key}, which the adapter brings, is not in the base")
        if is_same_weight(value, _read(self._base, source)):
            logger.info("%s of the adapter is the base's own, and dropped.", key)
            return
        if found is None:
            plan.added[key], plan.untied = source, True
        plan.replaced[found or key] = value
        logger.warning("%s is taken from the adapter, %s, in place of the base's.", key, tuple(value.shape))

    def embedding_of(self, module: str) -> str | None:
        """Where the weight of an output head is that has none: the embedding's, if it is tied to it."""
        if _last(module) not in _HEADS or not _is_tied(self._base):
            return None
        return self._embeddings[0] if len(self._embeddings) == 1 else None


def _is_tied(base: ModelFolder) -> bool:
    """What config.json says, of the text model in it if it is several; transformers ties where it says nothing."""
    parts = [part for part in (base.config, base.config.get("text_config")) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said[0]) if said else True


def _is_transposed(base: ModelFolder, peft: PeftAdapter, module: str, shape: list[int]) -> bool:
    """Whether a weight is (in_features, out_features): its shape says so, else the model's type, else the adapter."""
    a, b = peft.factors[module]
    if a.ndim == 3:  # as `fit_experts` has left it
        return layout_of(str(base.config.get("model_type", ""))).flagged
    out_features, in_features = b.shape[0], a.shape[1]
    if out_features != in_features:
        return shape == [in_features, out_features]
    kind = base.config.get("model_type")
    if kind in CONV1D_MODELS:
        return is_conv1d(kind, module)
    if isinstance(kind, str) and "auto_map" not in base.config:
        return False
    logger.warning(
        "%s: nothing tells whether its square weight is stored transposed; the adapter's fan_in_fan_out = %s is taken.",
        module,
        peft.fan_in_fan_out,
    )
    return peft.fan_in_fan_out


def _holds_matrices(key: str, entry: Entry) -> bool:
    """Whether a weight is a linear's, or of stacked experts, or the codes of such (gpt-oss's MXFP4)."""
    return key.endswith((".weight", "_blocks")) or len(entry.shape) == 3


def _read(base: ModelFolder, key: str) -> torch.Tensor:
    with safe_open(base.weights[key][0], framework="pt") as file:
        return file.get_tensor(key)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
