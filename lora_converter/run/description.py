"""What a step folder says of the run that wrote it, and whether another job may go on from it.

step-N/lora.json    model, flavor, base with its fingerprint, and the settings of [lora], which the tensors do not tell
"""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_converter.adapters import configs_of
from lora_converter.config import LoRAConfig
from lora_converter.files import read_json, write_whole
from lora_converter.run.base_identity import packed_by_format
from lora_converter.run.job import Job
from lora_converter.targets import reaches
from lora_converter.trained import select_trained

logger = logging.getLogger(__name__)

DESCRIPTION = "lora.json"

MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE = PARTS = (
    "model",
    "optimizer",
    "lr_scheduler",
    "dataloader",
    "train_state",
)
"""What a step is made of. The model's entries have their own names, those of the others begin with the part's."""

_MUST_AGREE = {"rank": None, "alpha": None, "use_rslora": None, "use_dora": False, "init": ""}
"""Of [lora], beside the linears that it selects, with what a step means that does not say. Dropout may change."""


@dataclass(frozen=True)
class Description:
    """What `lora.json` holds.

    Attributes:
        base: Where the base weights came from; empty if the step holds them itself.
        base_fingerprint: Of the weights that were loaded from there; empty if there were none, or if it was not taken.
        packed: What of them was packed (see `PackedWeights`).
        lora: The fields of `LoRAConfig`.
        custom_import: Module that registered the model with the host; empty if the host has it.
        tokens: Token -> id, of those whose rows train; a field of steps that have some.
        data: What the batches were made of, option -> value; empty in steps of older versions.
        converters: What else changed what the model computes, see `Job`; None in steps of older versions.
    """

    model: str
    flavor: str
    base: str
    lora: dict[str, Any]
    base_fingerprint: str = ""
    custom_import: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, list[str]] = field(default_factory=dict)
    converters: list[str] | None = None
    tokens: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of_job(
        job: Job, base_fingerprint: str, packed: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType({})
    ) -> "Description":
        """That of a job's steps.

        Args:
            packed: Packed weights -> their format, and their shape before.
        """
        lora = {field.name: getattr(job.config, field.name) for field in fields(LoRAConfig)}
        base = job.base.path if job.base else ""
        return Description(
            job.model,
            job.flavor,
            base,
            lora,
            base_fingerprint,
            custom_import=job.custom_import,
            data=job.data,
            packed=packed_by_format(packed),
            converters=list(job.converters),
            tokens=job.tokens,
        )

    @staticmethod
    def read(folder: str | Path) -> "Description | None":
        """That of a step folder; None if it has none.

        Raises:
            ValueError: It is damaged.
        """
        path = Path(folder) / DESCRIPTION
        try:
            found = read_json(path)
            description = Description(**found)
            LoRAConfig(**description.lora)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except TypeError as e:
            raise ValueError(f"{path} is damaged ({e}).") from None
        kinds: dict[str, type | tuple[type, ...]] = {
            "lora": dict,
            "data": dict,
            "packed": dict,
            "tokens": dict,
            "converters": (list, type(None)),
        }
        if not all(isinstance(value, kinds.get(name, str)) for name, value in vars(description).items()):
            raise ValueError(
                f"{path} is damaged: model, flavor and base must be strings, data a table, converters a list."
            )
        return description

    def write(self, folder: str | Path) -> None:
        """Into a step folder that is about to be written."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / DESCRIPTION, (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode())

    def differences(
        self,
        job: "Description",
        there: Iterable[str],
        here: Iterable[str],
        experts: Collection[str],
        base: Iterable[str] = (),
    ) -> list[str]:
        """What keeps a step from being continued by a job, one phrase each.

        Args:
            job: The description of that job.
            there: The adapted modules of the step.
            here: Those of the job.
            experts: Which of them are routed experts.
            base: Entries of the base, of which `train_also` names some.
        """
        pairs: list[tuple[str, Any, Any]] = [
            ("model.name", self.model, job.model),
            ("model.flavor", self.flavor, job.flavor),
        ]
        pairs += [(f"lora.{name}", self.lora.get(name, unsaid), job.lora[name]) for name, unsaid in _MUST_AGREE.items()]
        found = [f"{option} is {value!r} there and {ours!r} here" for option, value, ours in pairs if value != ours]
        there, here = set(there), set(here)
        if not found:
            found = self._setting_differences(job, sorted(there & here), experts)
        for where, more in (("there", there - here), ("here", here - there)):
            found += [f"{len(more)} modules are adapted only {where}: {', '.join(sorted(more))}"] if more else []
        return found + self._trained_differences(job, base) + self._token_differences(job)

    def _trained_differences(self, job: "Description", base: Iterable[str]) -> list[str]:
        modules = [name.rpartition(".")[0] for name in base]
        there, here = (set(select_trained(modules, d.lora.get("train_also", []), strict=False)) for d in (self, job))
        return [
            f"{len(more)} modules train in full only {where}, by lora.train_also: {', '.join(sorted(more))}"
            for where, more in (("there", there - here), ("here", here - there))
            if more
        ]

    def _token_differences(self, job: "Description") -> list[str]:
        if self.tokens == job.tokens:
            return []
        each = (sorted(d.tokens.items(), key=lambda entry: entry[1]) for d in (self, job))
        there, here = (", ".join(f"{token!r} ({index})" for token, index in tokens) for tokens in each)
        return [f"rows of {there or 'no tokens'} train there, and of {here or 'none'} here, by lora.new_tokens"]

    def data_differences(self, data: dict[str, Any]) -> list[str]:
        """What the batches of this step and of a job are made of differently, one phrase each."""
        pairs = [(option, value, data.get(option)) for option, value in self.data.items()]
        return [f"{option} was {there!r} and is {here!r}" for option, there, here in pairs if there != here]

    def _setting_differences(self, job: "Description", fqns: list[str], experts: Collection[str]) -> list[str]:
        """Modules that have another rank or alpha, by the patterns and by `expert_rank`."""
        there, here = (d._settings(fqns, experts) for d in (self, job))
        found = []
        for name in ("rank", "alpha"):
            values = [(fqn, getattr(there[fqn], name), getattr(here[fqn], name)) for fqn in fqns]
            other = [f"{fqn} is {old} there and {new} here" for fqn, old, new in values if old != new]
            found += [f"lora.{name} of {'; of '.join(other)}"] if other else []
        return found

    def _settings(self, fqns: list[str], experts: Collection[str]) -> dict[str, LoRAConfig]:
        """Those of each module. Patterns of modules that only one of two runs has are left out."""
        lora = {**self.lora, "dropout": 0.0}
        for name in ("rank_pattern", "alpha_pattern"):
            table = self.lora.get(name, {})
            lora[name] = {
                pattern: value
                for pattern, value in table.items()
                if any(reaches(pattern, fqn, is_experts=fqn in experts) for fqn in fqns)
            }
        own = [fqn for fqn in fqns if fqn in experts]
        if not own:
            lora["expert_rank"] = 0
        return configs_of(LoRAConfig(**lora), [fqn for fqn in fqns if fqn not in experts], own)


def check_same_run(
    path: str,
    step: Description | None,
    job: Description,
    *,
    there: Iterable[str],
    here: Iterable[str],
    experts: Collection[str] = (),
    foreign: Iterable[str] = (),
    base: Iterable[str] = (),
) -> str:
    """Refuses adapters that were trained with other settings than the job's.

    Args:
        step: What is known of them; of a step folder, its `lora.json`.
        there: The modules that they adapt.
        here: Those that the job adapts.
        experts: Which of those are routed experts.
        foreign: What else is there that this job has not.
        base: Entries of the job's base.

    Returns:
        The fingerprint of the step's base; empty if it does not say.

    Raises:
        ValueError: All differences.
    """
    if step is None:
        logger.warning(f"LoRA: {path} has no {DESCRIPTION}, so its settings and its base are not checked.")
        return ""
    found = step.differences(job, there, here, experts, base)
    if not found and (foreign := list(foreign)):
        found = [f"{len(foreign)} entries are there alone: {', '.join(foreign)}"]
    if found:
        raise ValueError(
            f"{path} was trained with other settings: {'; '.join(found)}. Use its settings, or start anew."
        )
    return step.base_fingerprint
