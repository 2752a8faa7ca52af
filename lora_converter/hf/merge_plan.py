"""What a merge will do, before a byte is written: which weight of the base gets which update, and what else changes.

Foreign files name one module in several ways, store copies of base weights beside the factors, tie the output head to
the embedding, and say of a weight's orientation what is not so. All of that is settled here, against the base's own
headers and `config.json`, or refused by name.
"""

import functools
import logging
from collections.abc import Iterable

from lora_converter.hf.base_as import CONV1D_MODELS, check_base_as, is_conv1d, weights_as
from lora_converter.hf.changed_base import beside_base
from lora_converter.hf.expert_layouts import layout_of
from lora_converter.hf.experts import fit_experts
from lora_converter.hf.folder import ModelFolder
from lora_converter.hf.merge_keys import EMBEDDINGS, HEADS, Keys, MergePlan, Update, is_tied, last_part
from lora_converter.hf.peft_adapter import PeftAdapter
from lora_converter.hf.saved_modules import is_saved

logger = logging.getLogger(__name__)


def plan_merge(base: ModelFolder, peft: PeftAdapter, adapter: str, *, base_as: str = "") -> MergePlan:
    """Settles all of it.

    Args:
        base_as: See `merge_directories`.

    Raises:
        ValueError: Every module and weight that does not fit, with the reason.
    """
    if base_as:
        check_base_as(base, base_as, peft.packed)
    keys, kind = Keys(base), str(base.config.get("model_type", ""))
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
    for module, rows in peft.token_rows.items():
        try:
            keys.settle_rows(module, rows, plan)
        except ValueError as e:
            problems.append(str(e))
    problems += keys.left_behind(plan)
    if problems:
        raise ValueError(f"The adapter in {adapter} does not fit the base in {base.path}: {'; '.join(problems)}.")
    reading = {of.module: (functools.partial(base.read, key), of.transposed) for key, of in plan.updates.items()}
    plan.peft = beside_base(plan.peft, reading, adapter, base_as=base_as)
    _keep_tied_head(base, plan)
    heads = [key for key in (*plan.updates, *plan.replaced) if last_part(key.removesuffix(".weight")) in HEADS]
    plan.untied = plan.untied or bool(heads and is_tied(base))
    if head := keys.stored_tied_head(plan):
        weights = plan.replaced.items()
        plan.replaced[head] = next(w for key, w in weights if last_part(key.removesuffix(".weight")) in EMBEDDINGS)
    if base_as:
        linears = {key: update.transposed for key, update in plan.updates.items() if len(keys.shape(key, plan)) == 2}
        packed = weights_as(base, base_as, peft.packed, transposed=linears)
        plan.packed = {key: as_packed for key, as_packed in packed.items() if key not in plan.replaced}
    return plan


def _keep_tied_head(base: ModelFolder, plan: MergePlan) -> None:
    """An embedding that PEFT trained in full is a copy: an output head that is tied to the base's keeps that."""
    brought = {last_part(key.removesuffix(".weight")): key for key in plan.replaced}
    embedding = next((key for last, key in brought.items() if last in EMBEDDINGS), None)
    if embedding and is_saved(embedding, plan.peft.modules_to_save) and is_tied(base) and not HEADS & brought.keys():
        plan.added["lm_head.weight"], plan.untied = embedding, True


def without_weight(base: ModelFolder, modules: Iterable[str]) -> list[str]:
    """The modules that cannot be merged into a base: their weights are not in it, or quantized.

    An expert's weight may be a part of a stack, and a stack's may be the weights of single experts.
    """
    keys = Keys(base)
    found = {module: keys.find(module) or keys.of_expert(module) or keys.embedding_of(module) for module in modules}
    return [module for module, key in found.items() if key is None or not base.weights[key][1].is_float]


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
