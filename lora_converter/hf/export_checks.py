"""That what a run is to write at its end can be written, found out before it trains."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lora_converter.hf.bridge import LinearShapes
from lora_converter.hf.expert_bridge import briefly, host_experts
from lora_converter.hf.expert_naming import ExpertShapes
from lora_converter.hf.folder import open_model
from lora_converter.hf.merge_plan import without_weight
from lora_converter.hf.naming import StateDictAdapter, hf_names
from lora_converter.hf.saved_modules import without_keys


def check_exportable(
    adapter: StateDictAdapter | None,
    linears: LinearShapes,
    adapted: Iterable[str],
    experts: ExpertShapes = MappingProxyType({}),
    trained: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Finds out before the training what would otherwise fail after it.

    Args:
        trained: Weights that train in full -> their shapes.

    Raises:
        ValueError: An adapted module or such a weight has no name in Hugging Face's terms; all such are named.
    """
    if adapter is None:
        raise ValueError("checkpoint.last_save_in_hf: the model has no StateDictAdapter to name PEFT's modules by.")
    nameless = []
    for fqn in adapted:
        try:
            _stored_names(adapter, fqn, linears, experts)
        except ValueError:
            nameless.append(fqn)
    if nameless:
        raise ValueError(
            f"checkpoint.last_save_in_hf: {type(adapter).__name__} has no Hugging Face name for {len(nameless)} "
            f"adapted modules: {', '.join(nameless)}. Name them in lora.exclude_modules, or leave last_save_in_hf at "
            "false."
        )
    if lost := without_keys(adapter, trained):
        raise ValueError(
            f"checkpoint.last_save_in_hf: {type(adapter).__name__} has no Hugging Face name for {', '.join(lost)}. "
            "Leave it out of lora.train_also, or leave last_save_in_hf at false."
        )


def check_mergeable(
    adapter: StateDictAdapter,
    linears: LinearShapes,
    adapted: Iterable[str],
    base: str,
    experts: ExpertShapes = MappingProxyType({}),
) -> None:
    """The same for merging: the weights of every adapted module are in the base's files, and not quantized.

    Raises:
        ValueError: Some are not; all are named.
    """
    folder = open_model(base)
    names = [name for fqn in adapted for name in _stored_names(adapter, fqn, linears, experts)]
    if wrong := without_weight(folder, names):
        shown = ", ".join(briefly([f"{name}.weight" for name in wrong]))
        raise ValueError(
            f"lora.save_merged: {len(wrong)} adapted weights are not in {base}, or quantized there: {shown}. Name "
            "their modules in lora.exclude_modules, or leave save_merged at false."
        )


def _stored_names(adapter: StateDictAdapter, fqn: str, linears: LinearShapes, experts: ExpertShapes) -> list[str]:
    """The modules of Hugging Face's, or parameters, that hold an adapted module's weights."""
    if fqn in experts:
        (module,) = host_experts(adapter, {fqn: experts[fqn]})
        return [part.name for part in module.parts]
    out_features, in_features = linears[fqn]
    return hf_names(adapter, fqn, out_features=out_features, in_features=in_features)
