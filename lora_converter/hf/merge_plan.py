"""What a merge will do, before a byte is written: which weight of the base gets which update, and what else changes.

Foreign files name one module in several ways, store copies of base weights beside the factors, tie the output head to
the embedding, and say of a weight's orientation what is not so. All of that is settled here, against the base's own
headers and `config.json`, or refused by name.
"""

import logging
from dataclasses import dataclass, field

import torch
from safetensors import safe_open

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.folder import ModelFolder
from lora_converter.hf.peft_adapter import PeftAdapter

logger = logging.getLogger(__name__)

_HEADS = {"lm_head", "embed_out", "output"}
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}

_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
"""transformers' models whose linears are Conv1D, and the names of those that are."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight.

    Attributes:
        module: Of the adapter.
        transposed: The weight is (in_features, out_features).
    """

    module: str
    transposed: bool


@dataclass
class MergePlan:
    """The merged model, as changes to the base's folder.

    Attributes:
        adapter: Its name in messages.
        updates: Key of the merged model -> its update.
        replaced: Key -> weight that the adapter brings in place of the base's.
        added: Key that the base has not -> key whose weight it starts from and beside which it is written.
        untied: The output head has a weight of its own from now on.
    """

    adapter: str
    updates: dict[str, Update] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    untied: bool = False

    @property
    def vocab_size(self) -> int | None:
        """Of the merged model, where the adapter brings an embedding."""
        sizes = {value.shape[0] for key, value in self.replaced.items()}
        return sizes.pop() if len(sizes) == 1 else None


def plan_merge(base: ModelFolder, peft: PeftAdapter, adapter: str) -> MergePlan:
    """Settles all of it.

    Raises:
        ValueError: Every module and weight that does not fit, with the reason.
    """
    plan, problems = MergePlan(adapter), []
    keys = _Keys(base)
    for module, (a, b) in peft.factors.items():
        try:
            key = keys.of_module(module, b.shape[0], a.shape[1], plan)
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
    heads = [key for key in (*plan.updates, *plan.replaced) if _last(key.removesuffix(".weight")) in _HEADS]
    plan.untied = plan.untied or bool(heads and _is_tied(base))
    return plan


def can_be_merged(base: ModelFolder, module: str) -> bool:
    """Whether a module's weight is in the base, or tied to one that is, and not quantized."""
    keys = _Keys(base)
    key = keys.find(module) or keys.embedding_of(module)
    return key is not None and base.weights[key][1].is_float


class _Keys:
    """The base's keys, found by an adapter's modules."""

    def __init__(self, base: ModelFolder):
        self._base = base
        modules = [key.removesuffix(".weight") for key in base.weights if key.endswith(".weight")]
        self._aliases = Aliases(modules, str(base.config.get("model_type", "")))
        self._embeddings = [f"{module}.weight" for module in modules if _last(module) in _EMBEDDINGS]

    def shape(self, key: str, plan: MergePlan) -> list[int]:
        """Of a weight of the merged model before its update."""
        return self._base.weights[plan.added.get(key, key)][1].shape

    def of_module(self, module: str, out_features: int, in_features: int, plan: MergePlan) -> str:
        """The key of the weight that a module's update is added to."""
        key = self.find(module)
        if key is None:
            key, embedding = f"{module}.weight", self.embedding_of(module)
            if embedding is None:
                raise ValueError(f"{key} is not in the base")
            plan.added[key], plan.untied = embedding, True
            logger.info("%s is tied to %s: it gets a weight of its own.", key, embedding)
        entry = self._base.weights[plan.added.get(key, key)][1]
        here = [out_features, in_features]
        if entry.shape not in (here, here[::-1]):
            raise ValueError(f"{key} is {tuple(entry.shape)} in the base and {tuple(here)} in the adapter")
        if not entry.is_float:
            raise ValueError(f"{key} is quantized ({entry.dtype}); merge into an unquantized copy of the base")
        return key

    def find(self, module: str) -> str | None:
        """The key of a module's weight, under whatever name."""
        name = self._aliases.find(module)
        return None if name is None else f"{name}.weight"

    def settle_copy(self, key: str, value: torch.Tensor, plan: MergePlan) -> None:
        """Drops a copy of a base weight that equals it, and takes another one in its place."""
        found = self.find(key.removesuffix(".weight"))
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


def is_same_weight(copy: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether two weights are equal, in the less precise dtype of the two."""
    dtype = min((copy.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
    return copy.shape == weight.shape and torch.equal(copy.to(dtype), weight.to(dtype))


def _is_tied(base: ModelFolder) -> bool:
    """What config.json says, of the text model in it if it is several; transformers ties where it says nothing."""
    parts = [part for part in (base.config, base.config.get("text_config")) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said[0]) if said else True


def _is_transposed(base: ModelFolder, peft: PeftAdapter, module: str, shape: list[int]) -> bool:
    """Whether a weight is (in_features, out_features): its shape says so, else the model's type, else the adapter."""
    a, b = peft.factors[module]
    out_features, in_features = b.shape[0], a.shape[1]
    if out_features != in_features:
        return shape == [in_features, out_features]
    kind = base.config.get("model_type")
    if kind in _CONV1D_MODELS:
        return _last(module) in _CONV1D_MODULES
    if isinstance(kind, str) and "auto_map" not in base.config:
        return False
    logger.warning(
        "%s: nothing tells whether its square weight is stored transposed; the adapter's fan_in_fan_out = %s is taken.",
        module,
        peft.fan_in_fan_out,
    )
    return peft.fan_in_fan_out


def _read(base: ModelFolder, key: str) -> torch.Tensor:
    with safe_open(base.weights[key][0], framework="pt") as file:
        return file.get_tensor(key)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
