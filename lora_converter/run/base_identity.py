"""Which base adapters were trained on: its fingerprint, what its weights were packed as, what else changed it."""

import logging
from collections.abc import Mapping, Sequence

from lora_converter.hf.packed_base import PackedBase

logger = logging.getLogger(__name__)


PackedWeights = Mapping[str, Sequence[str]]
"""Format -> names of the weights that are packed so, with numbers in braces (see `PackedBase`)."""


def packed_by_format(packed: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, list[str]]:
    """Packed weights -> their format, and their shape before: as a step has it."""
    names: dict[str, list[str]] = {}
    for name, (form, _) in packed.items():
        names.setdefault(form, []).append(name)
    return {form: list(PackedBase.of(form, own).weights) for form, own in sorted(names.items())}


def check_same_format(path: str, there: PackedWeights, here: PackedWeights, *, accept: bool) -> None:
    """Refuses adapters that were trained on a base that was packed otherwise, and so had other values.

    Args:
        there: What was packed of the base of the adapters in `path`.
        here: What is of the job's.
        accept: Only warn.

    Raises:
        ValueError: They differ.
    """
    if there == here:
        return
    was, is_now = (f"packed as {' and '.join(forms)}" if forms else "not packed" for forms in (there, here))
    others = " in other weights" * (there.keys() == here.keys())
    both = f"{path} was trained on a base that was {was}; the base here is {is_now}{others}."
    _refuse(both, "Set lora.base_format and the base as they were there", accept=accept)


def check_same_converters(path: str, there: Sequence[str] | None, here: Sequence[str], *, accept: bool) -> None:
    """Refuses adapters that were trained on a model that computes something else, on float8 linears say.

    Args:
        there: The other converters of the run in `path`, in order; None if not known.
        here: The job's.
        accept: Only warn.

    Raises:
        ValueError: They differ.
    """
    if there is None or list(there) == list(here):
        return
    both = f'Beside "lora" {path} was trained with model.converters {list(there)}; here they are {list(here)}.'
    _refuse(both, "Set model.converters as they were there", accept=accept)


def check_same_base(path: str, recorded: str, base: str, found: str, *, accept: bool) -> None:
    """Refuses adapters that were trained on another base than the one that is loaded.

    Args:
        recorded: Fingerprint of the base of the adapters in `path`; empty if not known.
        base: Where the base was loaded from.
        found: Its fingerprint; empty if there is none.
        accept: Only warn.

    Raises:
        ValueError: They differ.
    """
    if recorded in ("", found) or not found:
        return
    both = f"{path} was trained on a base with fingerprint {recorded}; that of {base} is {found}."
    _refuse(both, "Name the base it was trained on", accept=accept)


def _refuse(both: str, remedy: str, *, accept: bool) -> None:
    """Raises what differs, or only warns of it where the user accepts another base."""
    if not accept:
        raise ValueError(f"{both} {remedy}, or set lora.accept_other_base = true.")
    logger.warning(f"LoRA: {both} lora.accept_other_base is set, so it is used all the same.")
