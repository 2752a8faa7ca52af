"""What a step folder says of itself, and its adapters as PEFT's, read without a training job.

step-N/lora.json    model, flavor, base with its fingerprint, and the settings of [lora], which the tensors do not tell
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import OPTIMIZER
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from lora_converter.config import LoRAConfig
from lora_converter.files import read_json, write_whole
from lora_converter.linear import LoRALinear
from lora_converter.peft import PeftAdapter
from lora_converter.titan.peft_bridge import adapted_fqns, linear_shapes, to_peft
from lora_converter.titan.safe_dcp import load, read_metadata

DESCRIPTION = "lora.json"

_MUST_AGREE = ("rank", "alpha", "use_rslora")
"""Of [lora], beside the linears that it selects. Dropout may change during a run."""


@dataclass(frozen=True)
class Description:
    """What `lora.json` holds.

    Attributes:
        base: Where the base weights came from; empty if the step holds them itself.
        base_fingerprint: Of the weights that were loaded from there; empty if there were none, or if it was not taken.
        lora: The fields of `LoRAConfig`.
    """

    model: str
    flavor: str
    base: str
    lora: dict[str, Any]
    base_fingerprint: str = ""

    @staticmethod
    def of_job(job_config: Any, base: str | None, base_fingerprint: str) -> "Description":
        """That of a job's steps."""
        lora = {field.name: getattr(job_config.lora, field.name) for field in fields(LoRAConfig)}
        model = job_config.model
        return Description(model.name, model.flavor, base or "", lora, base_fingerprint)

    @staticmethod
    def read(folder: str | Path) -> "Description | None":
        """That of a step folder; None if it has none.

        Raises:
            ValueError: It is damaged.
        """
        path = Path(folder) / DESCRIPTION
        try:
            found = read_json(path)
            description = Description(**{"base_fingerprint": "", **found})
            LoRAConfig(**description.lora)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except TypeError as e:
            raise ValueError(f"{path} is damaged ({e}).") from None
        others = (description.model, description.flavor, description.base, description.base_fingerprint)
        if not all(isinstance(value, str) for value in others):
            raise ValueError(f"{path} is damaged: model, flavor and base must be strings.")
        return description

    def write(self, folder: str | Path) -> None:
        """Into a step folder that is about to be written."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / DESCRIPTION, (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode())

    def differences(self, job: "Description", there: Iterable[str], here: Iterable[str]) -> list[str]:
        """What keeps a step from being continued by a job, one phrase each.

        Args:
            job: The description of that job.
            there: The adapted linears of the step.
            here: Those of the job.
        """
        pairs: list[tuple[str, Any, Any]] = [
            ("model.name", self.model, job.model),
            ("model.flavor", self.flavor, job.flavor),
        ]
        pairs += [(f"lora.{name}", self.lora.get(name), job.lora[name]) for name in _MUST_AGREE]
        found = [f"{option} is {value!r} there and {ours!r} here" for option, value, ours in pairs if value != ours]
        there, here = set(there), set(here)
        for where, more in (("there", there - here), ("here", here - there)):
            found += [f"{len(more)} linears are adapted only {where}: {', '.join(sorted(more))}"] if more else []
        return found


def adapted_in(stored: Metadata) -> list[str]:
    """The linears that a step folder has adapters of."""
    names = [name for name in stored.state_dict_metadata if not name.startswith(f"{OPTIMIZER}.")]
    return adapted_fqns(name for name in names if name.endswith(LoRALinear.adapter_parameter_names))


def check_same_run(
    path: str, step: Description | None, job: Description, *, there: Iterable[str], here: Iterable[str]
) -> str:
    """Refuses adapters that were trained with other settings than the job's.

    Args:
        step: What is known of them; of a step folder, its `lora.json`.
        there: The linears that they adapt.
        here: Those that the job adapts.

    Returns:
        The fingerprint of the step's base; empty if it does not say.

    Raises:
        ValueError: All differences.
    """
    if step is None:
        logger.warning(f"LoRA: {path} has no {DESCRIPTION}, so its settings and its base are not checked.")
        return ""
    if found := step.differences(job, there, here):
        raise ValueError(
            f"{path} was trained with other settings: {'; '.join(found)}. Use its settings, or start anew."
        )
    return step.base_fingerprint


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


def read_step(path: str | Path, *, base: str = "") -> PeftAdapter:
    """The adapters of a step folder in Hugging Face's names.

    Args:
        base: For `base_model_name_or_path`; the run's own base if left out.

    Raises:
        ValueError: It is no complete step folder of a LoRA run, or damaged.
    """
    described = Description.read(path)
    if described is None:
        raise ValueError(f"{path} is no complete step folder of a LoRA run: it has no {DESCRIPTION}.")
    metadata = read_metadata(path)
    stored = metadata.state_dict_metadata
    try:
        spec = get_train_spec(described.model)
        args = spec.model_args[described.flavor]
    except (KeyError, ValueError):
        raise ValueError(f"{path}: torchtitan has no model {described.model!r} {described.flavor!r}.") from None
    if spec.state_dict_adapter is None:
        raise ValueError(f"{path}: {described.model} has no StateDictAdapter to name Hugging Face's modules by.")
    args.update_from_config(JobConfig())
    with torch.device("meta"):
        linears = linear_shapes(spec.model_cls(args))
    config = LoRAConfig(**described.lora)
    names = LoRALinear.adapter_parameter_names
    shapes: dict[str, tuple[int, ...]] = {}
    for fqn, (out_features, in_features) in linears.items():
        a, b = (f"{fqn}.{name}" for name in names)
        wanted = {a: (config.rank, in_features), b: (out_features, config.rank)}
        shapes |= wanted if all(name in stored for name in wanted) else {}
    wrong = [name for name, shape in shapes.items() if getattr(stored[name], "size", None) != shape]
    if wrong or not shapes:
        raise ValueError(f"{path} is damaged: {', '.join(wrong) or 'no adapter'} is not what {DESCRIPTION} says.")
    state_dict = {name: torch.empty(shape) for name, shape in shapes.items()}
    load(state_dict, path, metadata, no_dist=True)
    adapter = spec.state_dict_adapter(args, None)
    return to_peft(
        adapter,
        state_dict,
        linears,
        config,
        base_model=base or described.base,
        base_fingerprint=described.base_fingerprint,
    )
