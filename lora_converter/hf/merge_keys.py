"""The keys of a base that an adapter's modules mean, and what a merge makes of them: the plan, as it is filled in."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from safetensors import safe_open

from lora_converter.hf.aliases import Aliases
from lora_converter.hf.base_as import AsPacked
from lora_converter.hf.expert_layouts import layout_of, stored_experts
from lora_converter.hf.expert_patterns import split_expert
from lora_converter.hf.folder import Entry, ModelFolder
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.saved_modules import is_same_weight
from lora_converter.hf.stacked import OUTER
from lora_converter.hf.trained_tokens import TokenRows, with_rows

logger = logging.getLogger(__name__)

HEADS = {"lm_head", "embed_out", "output"}
EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}

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
        names = HEADS | EMBEDDINGS
        sizes = {v.shape[0] for key, v in self.replaced.items() if last_part(key.removesuffix(".weight")) in names}
        return sizes.pop() if len(sizes) == 1 else None


class Keys:
    """The base's keys, found by an adapter's modules."""

    def __init__(self, base: ModelFolder):
        self._base = base
        kind = str(base.config.get("model_type", ""))
        self._keys = {
            _PARTS.sub("", key): key for key, (_, entry) in base.weights.items() if _holds_matrices(key, entry)
        }
        self._aliases = Aliases(self._keys, kind)
        self._embeddings = [key for module, key in self._keys.items() if last_part(module) in EMBEDDINGS]
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
        others = plan.peft.base_weights.items() if plan.peft.token_rows else ()
        if found is None and any(other != key and is_same_weight(value, each) for other, each in others):
            return  # a tied head's, which is the embedding's
        if found is None:
            plan.added[key], plan.untied = source, True
        plan.replaced[found or key] = value
        logger.warning("%s is taken from the adapter, %s, in place of the base's.", key, tuple(value.shape))

    def settle_rows(self, module: str, trained: TokenRows, plan: MergePlan) -> None:
        """Puts trained rows of tokens into a weight, which may get more rows by it."""
        name = self.find(module)
        source = name or self.embedding_of(module)
        others = plan.peft.token_rows.items()
        if name is None and any(other != module and each.equals(trained) for other, each in others):
            return  # a tied head's, which are the embedding's
        if source is None:
            raise ValueError(f"{module}.weight, rows of which the adapter brings, is not in the base")
        entry = self._base.weights[source][1]
        if not entry.is_float or entry.shape[1:] != list(trained.rows.shape[1:]):
            raise ValueError(
                f"{source} is {tuple(entry.shape)} ({entry.dtype}) in the base, and the adapter's rows of tokens are "
                f"{tuple(trained.rows.shape)}"
            )
        if name is None:
            plan.added[f"{module}.weight"], plan.untied = source, True
        weight = plan.replaced.get(source, None)
        plan.replaced[name or f"{module}.weight"] = with_rows(
            _read(self._base, source) if weight is None or name is None else weight, trained
        )
        logger.info("%d rows of %s are taken from the adapter.", len(trained.ids), source)

    def left_behind(self, plan: MergePlan) -> Iterable[str]:
        """What would have fewer rows than the vocabulary that trained rows of new tokens make."""
        size = max((max(each.ids) + 1 for each in plan.peft.token_rows.values()), default=0)
        for module, key in self._keys.items():
            rows = self._base.weights[key][1].shape[0]
            settled = key in plan.replaced or self.stored_tied_head(plan) == key
            if last_part(module) in HEADS | EMBEDDINGS and rows < size and not settled:
                yield f"{key} has {rows} rows, and the adapter brings new tokens up to {size - 1} without rows for it"

    def stored_tied_head(self, plan: MergePlan) -> str | None:
        """The key of a head that is tied and stored all the same, of whose embedding trained rows are put in place.

        transformers ties no head to an embedding that is stored beside it with other values.
        """
        trained = {self.find(module) for module in plan.peft.token_rows}
        heads = [key for module, key in self._keys.items() if last_part(module) in HEADS]
        if len(heads) != 1 or len(self._embeddings) != 1 or not is_tied(self._base):
            return None
        (head,), (embedding,) = heads, self._embeddings
        if embedding not in trained or head in plan.replaced or head in plan.updates:
            return None
        return head if is_same_weight(_read(self._base, head), _read(self._base, embedding)) else None

    def embedding_of(self, module: str) -> str | None:
        """Where the weight of an output head is that has none: the embedding's, if it is tied to it."""
        if last_part(module) not in HEADS or not is_tied(self._base):
            return None
        return self._embeddings[0] if len(self._embeddings) == 1 else None


def is_tied(base: ModelFolder) -> bool:
    """What config.json says, of the text model in it if it is several; transformers ties where it says nothing."""
    parts = [part for part in (base.config, base.config.get("text_config")) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said[0]) if said else True


def _holds_matrices(key: str, entry: Entry) -> bool:
    """Whether a weight is a linear's, or of stacked experts, or the codes of such (gpt-oss's MXFP4)."""
    return key.endswith((".weight", "_blocks")) or len(entry.shape) == 3


def _read(base: ModelFolder, key: str) -> torch.Tensor:
    with safe_open(base.weights[key][0], framework="pt") as file:
        return file.get_tensor(key)


def last_part(name: str) -> str:
    return name.rpartition(".")[2]
