"""Which base adapters were trained on: its fingerprint, and what its weights were packed as."""

import logging

logger = logging.getLogger(__name__)


def check_same_format(path: str, there: str, here: str, *, accept: bool) -> None:
    """Refuses adapters that were trained on a base of another format, which has other values.

    Args:
        there: The format of the base of the adapters in `path`.
        here: That of the job, `lora.base_format`.
        accept: Only warn.

    Raises:
        ValueError: They differ.
    """
    if there == here:
        return
    both = f"{path} was trained on a base with lora.base_format = {there!r}; here it is {here!r}."
    if not accept:
        raise ValueError(f"{both} Set it to {there!r}, or set lora.accept_other_base = true.")
    logger.warning(f"LoRA: {both} lora.accept_other_base is set, so it is used all the same.")


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
    if not accept:
        raise ValueError(f"{both} Name the base it was trained on, or set lora.accept_other_base = true.")
    logger.warning(f"LoRA: {both} lora.accept_other_base is set, so it is used all the same.")
