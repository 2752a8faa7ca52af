"""Which torchtitan is installed, and so whose rooms a command or a job goes to."""

import importlib
import importlib.metadata
import importlib.util
from typing import Any

ROOMS = {"0.2.2": "titan", "0.3.0": "titan03"}
"""Version of torchtitan -> the room that is its host."""

_EXTRAS = (
    "Install one with `pip install lora-converter[titan022]` (torchtitan 0.2.2, TOML files) or "
    "`pip install lora-converter[titan03]` (0.3.0, Python configs), each in an environment of its own: both cannot be "
    "installed at once."
)


def room() -> str:
    """The room of the installed torchtitan: "titan" or "titan03".

    Raises:
        ValueError: There is none, or another version.
    """
    try:
        version = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"torchtitan is not installed. {_EXTRAS}") from None
    if version not in ROOMS:
        raise ValueError(f"torchtitan {version} is installed, and this package knows {', '.join(ROOMS)}. {_EXTRAS}")
    return ROOMS[version]


def host_module(name: str, what: str) -> Any:
    """A module that both hosts have, or one of them: that of the installed torchtitan.

    Args:
        what: Asks for it, as the user calls it.

    Raises:
        ValueError: No torchtitan that we know is installed, or its host lacks the module.
    """
    full_name = f"lora_converter.{room()}.{name}"
    if importlib.util.find_spec(full_name) is None:
        raise ValueError(
            f"{what} does not work with torchtitan 0.3 yet: it is built from parts of torchtitan 0.2.2's trainer, and "
            "needs a counterpart over 0.3's configs. Use an environment with `pip install lora-converter[titan022]`."
        )
    return importlib.import_module(full_name)
