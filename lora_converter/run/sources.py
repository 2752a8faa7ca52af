"""Where a run's values come from. Each source has one shape: `check` everything that does not fit, then `load`.

    BaseSource       the frozen weights, from a DCP or a Hugging Face folder
    StepSource       a step of this run: adapters, optimizer, ...

All checks of all sources come before the first load. They are collectives: all ranks raise, or none.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch.distributed.checkpoint.stateful import Stateful

from lora_converter.dcp.folder import DcpBase, agreed_metadata, check_fits
from lora_converter.dcp.reader import load as load_dcp
from lora_converter.dcp.states import OptimizerState
from lora_converter.hf.base import HuggingFaceBase
from lora_converter.ranks import agreed
from lora_converter.run.adapter_sources import PeftSource, check_base_of_adapter, check_run_of_step
from lora_converter.run.description import DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER, PARTS
from lora_converter.run.job import Job
from lora_converter.run.model import RunModel
from lora_converter.run.steps import Step
from lora_converter.tensors import local_part

logger = logging.getLogger(__name__)

BASE_OPTION = "checkpoint.initial_load_path"


class Source(Protocol):
    """A place that values of a run come from."""

    def check(self) -> None:
        """Compares it with the model, before anything is loaded.

        Raises:
            ValueError: On all ranks: everything that does not fit.
        """

    def load(self) -> None:
        """Loads what was checked."""


class BaseSource:
    """The frozen weights. What is loaded is known by its fingerprint from then on."""

    def __init__(self, model: RunModel):
        self._model = model
        self._seconds = {"read": 0.0, "checks": 0.0}
        base, adapter = model.host.job.base, model.host.state_dict_adapter
        assert base is not None
        self._path, self._twins = base.path, model.twins()
        if base.format == "dcp":
            self._folder: Source = DcpBase(self._twins, base.path, BASE_OPTION)
        elif adapter is None:
            raise ValueError("checkpoint.initial_load_in_hf: the model has no StateDictAdapter. Load a DCP folder.")
        else:
            with self._timed("checks"):
                self._folder = HuggingFaceBase(adapter, base.path, self._twins, quantized=base.quantized)

    def check(self) -> None:
        """Compares keys and shapes."""
        with self._timed("checks"):
            self._folder.check()

    def load(self) -> None:
        """Loads the base and takes its fingerprint."""
        logger.info(f"LoRA: loading the base from {self._path}.")
        with self._timed("read"):
            self._folder.load()
        with self._timed("checks"):
            self._model.take_fingerprint(self._twins.sums)
        size = sum(local_part(value).nbytes for value in self._model.base.state_dict().values())
        logger.info(
            f"LoRA: base read in {self._seconds['read']:.1f} s ({size / 1e9:.2g} GB on this rank), "
            f"adapters made in {self._model.host.adapters_made_in:.1f} s, checks {self._seconds['checks']:.1f} s."
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - start


class StepSource:
    """A step of this run.

    Args:
        load_end: Called with the step's number where the run is over and the step holds adapters alone.
    """

    def __init__(self, model: RunModel, step: Step, load_end: Callable[[int], None]):
        self._model, self._step, self._load_end = model, step, load_end
        job, number = model.host.job, step.number
        wants_state = number > 0 and self.loads_state(job)  # step 0 is a seed checkpoint
        over = number >= job.steps
        self._lacks_state = wants_state and not over and not step.has_state
        self._is_end = over and (step.is_peft or (wants_state and not step.has_state))
        self._model_only = number == 0 or self._is_end
        self._peft = PeftSource(model, f"{step.path}", of_run=True) if step.is_peft else None

    @staticmethod
    def loads_state(job: Job) -> bool:
        """Whether more than the model is read of a step."""
        return any(part not in job.not_loaded for part in PARTS if part != MODEL)

    def check(self) -> None:
        """Compares settings, keys and shapes, and whether the base comes from where the step needs it from."""
        agreed(self._step.is_peft, f"Whether {self._step.path} is a PEFT directory")
        step, job = self._step, self._model.host.job
        if step.stored is not None:
            agreed_metadata(step.path, f"checkpoint.load_step = {step.number}", step.digest)
            self._check_base(step.stored.state_dict_metadata)
        if self._lacks_state:
            raise ValueError(
                f"{step.no_state}. To train on from its adapters, name it as lora.initial_adapter_path in a new "
                "job.dump_folder, or resume an earlier step with checkpoint.load_step."
            )
        if self._peft is not None:
            self._peft.check()
            return
        assert step.stored is not None
        self._base_fingerprint = ""
        if MODEL not in job.not_loaded:
            self._base_fingerprint = check_run_of_step(self._model, step)
            check_fits(self._model.stored.state_dict(), step.stored, f"{step.path}")

    def _check_base(self, names: Mapping[str, Any]) -> None:
        source, path = self._model.host.job.base, self._step.path
        frozen = self._model.frozen_names()
        stores_base = any(name in names for name in frozen)
        if source and stores_base and all(name in names for name in frozen):
            raise ValueError(
                f"{path} stores a base of its own (its run had no checkpoint.initial_load_path), but "
                f"{source.path} is given as base. Resume without a base source, or use another job.dump_folder."
            )
        if not source and not stores_base:
            raise ValueError(
                f"{path} holds adapters only. Set checkpoint.initial_load_path to the base they were trained on."
            )

    def load(self) -> None:
        """Loads what is to be loaded of the step."""
        if self._peft is not None:
            self._peft.load()
        else:
            path, stored = self._step.path, self._step.stored
            assert stored is not None
            check_base_of_adapter(self._model, f"{path}", self._base_fingerprint)
            logger.info(f"LoRA: resuming from {path}.")
            states, model = self._states(), self._model.stored
            load_dcp(states, path, stored)
            if self._model_only or MODEL not in self._model.host.job.not_loaded:
                model.load_state_dict({name: states[name] for name in model.state_dict()})
        if self._is_end:
            self._load_end(self._step.number)

    def _states(self) -> dict[str, Any]:
        host = self._model.host
        model = self._model.stored.state_dict()
        if self._model_only:
            return model
        wanted = {name: state for name, state in host.states.items() if name not in host.job.not_loaded}
        description = self._step.description
        if DATALOADER in wanted and description and (other := description.data_differences(host.job.data)):
            del wanted[DATALOADER]
            logger.warning(
                f"LoRA: other data than in {self._step.path}: {'; '.join(other)}. They start at their beginning."
            )
        optimizer, schedule = wanted.get(OPTIMIZER), wanted.get(LR_SCHEDULER)
        if isinstance(optimizer, OptimizerState):
            wanted[OPTIMIZER] = optimizer.of_step(self._stored_of(OPTIMIZER))
        if schedule is not None:
            wanted[LR_SCHEDULER] = _AsFarAsStored(schedule, self._stored_of(LR_SCHEDULER))
        return wanted if MODEL in host.job.not_loaded else {**wanted, **model}

    def _stored_of(self, part: str) -> set[str]:
        """What the step holds of one of its parts."""
        assert self._step.stored is not None
        names = self._step.stored.state_dict_metadata
        return {name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")}


class _AsFarAsStored(Stateful):
    """A schedule, of which another host's step says where it was, and not what follows from the job."""

    def __init__(self, whole: Stateful, stored: set[str]):
        self._whole, self._stored = whole, stored

    def state_dict(self) -> dict[str, Any]:
        state = self._whole.state_dict()
        return {name: state[name] for name in state if name in self._stored} or state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._whole.load_state_dict({**self._whole.state_dict(), **state_dict})
