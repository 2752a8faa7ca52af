"""A LoRA run on a host's trainer: what it starts from, what its steps hold, how its adapters do, what it leaves.

    base      from its source, at every start
    step-N    adapters, optimizer, scheduler, data loader and train state; no base weight
    resume    base from its source + step-N
    export    the last step, as a PEFT directory
    merged-N  beside it, the whole model as a Hugging Face directory

A base without a source (random init) cannot be brought back by anything else, so then a step holds it too.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from lora_converter.hf.peft_directory import is_peft_directory
from lora_converter.merge import merge_directories
from lora_converter.ranks import agreed, is_first_rank, on_first_rank, together
from lora_converter.run.adapter_sources import AdapterSource, PeftSource, check_peft_forms_everywhere
from lora_converter.run.branch import Branch
from lora_converter.run.claim import Claim, check_shared
from lora_converter.run.dropout import DropoutSeeds
from lora_converter.run.export import write_peft
from lora_converter.run.faults import FaultWatch
from lora_converter.run.host import Host
from lora_converter.run.hyperparameters import Hyperparameters
from lora_converter.run.initial_factors import InitialFactors, begins_at_the_base
from lora_converter.run.initial_rows import InitialRows, begins_with_new_rows
from lora_converter.run.model import RunModel
from lora_converter.run.preemption import Preemption
from lora_converter.run.sources import BaseSource, Source, StepSource
from lora_converter.run.steps import Step, discard, newest_step, read_step

logger = logging.getLogger(__name__)


class Run:
    """One run. Its methods are called by the host, on all ranks (see `host.py`).

    Raises:
        ValueError: The run is to export a PEFT directory, and has adapters that PEFT has no form for.
    """

    def __init__(self, host: Host):
        self.host, self.job, self.config = host, host.job, host.job.config
        self.model = RunModel(host)
        self.faults = FaultWatch(host.model_parts)
        host.on_log(self.faults.on_log)
        self._dropout = DropoutSeeds(host.model_parts, host.data_rank) if self.config.dropout > 0 else None
        if self._dropout:
            host.around_trial_forwards(self._dropout.unseen)
        self._hyperparameters = Hyperparameters(host.optimizers, host.lr_schedulers)
        self._merge: Callable[[], None] | None = None
        self._claim, self._branch = Claim(self.job.folder), Branch(self.job.folder)
        self._preemption = Preemption()
        if self.job.exports_peft:
            check_peft_forms_everywhere(self.model)

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Loads the base from its source, then the given or the newest complete step, if there is one.

        Returns:
            Whether anything was loaded.

        Raises:
            ValueError: On all ranks, if on one a folder is not there, lacks keys, has other shapes or belongs to
                another run or base; nothing but the base was loaded then.
        """
        if not self.job.saves:
            return self._load(step)[0]
        on_first_rank(self._claim.hold)
        try:
            loaded, done = self._load(step)
        except BaseException:
            self._claim.release()  # what was refused writes nothing
            raise
        self._preemption.listen(done)
        return loaded

    def ends_after(self, step: int) -> bool:
        """Whether a signal ends the run after this step, which is to be saved then, and `end` called. On all ranks."""
        return step < self.job.steps and self._preemption.ends_after(step)

    def after_step(self, step: int, *, saves: bool) -> bool:
        """Looks at the adapters, before the gradients go; the generator is seeded for the next step.

        Args:
            saves: The step is to be saved. On all ranks or none.

        Returns:
            Whether the step may be saved: not if its adapters hold nan or inf.
        """
        finite = step == 0 or self.faults.after_step(step, saves=saves)  # step 0 is a seed checkpoint
        if not finite and saves:
            logger.error(f"LoRA: step {step} is not saved: its adapters hold nan or inf. Older steps stay.")
        if self._dropout:
            self._dropout.continue_after(step)
        return finite

    def prepare_step(self, path: str) -> None:
        """Makes room for a step folder and writes its description. Never onto an older step."""

        def make_room() -> None:
            self._make_sure_of_folder()
            discard(Path(path))
            self.model.description.write(path)

        on_first_rank(make_room)

    def export(self, step: int) -> None:
        """Writes a step as a PEFT directory; what is merged of it follows in `finish`."""
        on_first_rank(self._make_sure_of_folder)
        self.write_peft(self.step_path(step))
        self._merge_at_the_end(step)

    def write_peft(self, path: str) -> None:
        """Writes the adapters as a PEFT directory. A collective, see `export.py`."""
        write_peft(self.model, path)

    def finish(self) -> None:
        """Writes the merged model, on rank 0: no rank waits for it in a collective that could time out."""
        merge, self._merge = self._merge, None  # a failure is told once, not again when the host cleans up
        try:
            if merge is not None:
                merge()
        finally:
            self._preemption.close()
            self._claim.release()

    def end(self, step: int) -> NoReturn:
        """Ends the process after a step that a signal made the last one for now."""
        code = self._preemption.exit_code
        logger.info(f"LoRA: the run ends after step {step}, with exit code {code}. The same launch goes on from there.")
        self.host.end_process(code)

    def step_path(self, step: int) -> str:
        """The folder of a step."""
        return os.path.join(self.job.folder, f"step-{step}")

    def _make_sure_of_folder(self) -> None:
        """That it is still this run's, and holds steps of its own branch alone. Before anything is written."""
        self._claim.hold()
        self._branch.settle()

    def _load(self, step: int) -> tuple[bool, int]:
        """Whether anything was loaded, and how many steps are done."""
        found = together(lambda: self._find_step(step))
        agreed(found.number if found else -1, f"The step to resume from in {self.job.folder}")
        names = self.model.host_names
        if found and found.stored is not None:
            found = replace(found, stored=names.of_step(found.stored))
        sources: list[Source] = [BaseSource(self.model)] if self.job.base else []
        if begins_with_new_rows(self.job, found):
            sources.append(InitialRows(self.model))
        if found:
            sources.append(StepSource(self.model, found, self._load_end))
        elif self.config.initial_adapter_path:
            sources.append(self._initial_adapter(self.config.initial_adapter_path))
        if begins_at_the_base(self.job, found):
            sources.append(InitialFactors(self.model))
        for source in sources:
            source.check()
        if self.job.saves:
            check_shared(self.job.folder)
        for source in sources:
            source.load()
        self.model.keep_of_base()
        if step != -1 and self.job.saves:
            on_first_rank(lambda: self._branch.begin(step))
        for change in self._hyperparameters.put_back() if found else ():
            logger.info(f"LoRA: {change}")
        done = found.number if found else 0
        if self._dropout:
            self._dropout.continue_after(done)
        return bool(sources), done

    def _find_step(self, load_step: int) -> Step | None:
        step = self._branch.step_to_load(load_step) if self.job.saves else load_step
        if step == -1:
            loads_state = StepSource.loads_state(self.job)
            found, skipped = newest_step(self.job.folder, last=self.job.steps, needs_state=loads_state)
            for problem in skipped:
                logger.warning(f"LoRA: not resumed from: {problem}.")
            return found
        option, path = f"checkpoint.load_step = {step}", self.step_path(step)
        if not os.path.isdir(path):
            remedy = "Leave it at -1" if step == load_step else f"Delete {self._branch.path}"
            raise ValueError(f"{option}: there is no {path}. {remedy} for the newest step.")
        try:
            return read_step(step, Path(path))
        except ValueError as e:
            raise ValueError(f"{option}: {e}") from None

    def _initial_adapter(self, path: str) -> Source:
        if agreed(is_peft_directory(path), f"Whether {path} is a PEFT directory"):
            return PeftSource(self.model, path)
        return AdapterSource(self.model, path)

    def _load_end(self, step: int) -> None:
        """A run that is over, launched once more."""
        self.host.end_at(step)
        logger.info(f"LoRA: the run ended at step {step}; there is nothing left to train.")
        if not os.path.isdir(self._merged_path(step)):
            self._merge_at_the_end(step)

    def _merged_path(self, step: int) -> str:
        # Not step-N-merged: torchtitan takes any name with "step-" in it for a checkpoint of its own.
        return os.path.join(self.job.folder, f"merged-{step}")

    def _merge_at_the_end(self, step: int) -> None:
        base = self.job.base
        if not self.config.save_merged or base is None or not is_first_rank():
            return

        def merge() -> None:
            output = self._merged_path(step)
            logger.info(f"LoRA: merging into {output}.")
            merge_directories(base.path, self.step_path(step), output, replace=True)
            logger.info(f"LoRA: wrote the merged model to {output}.")

        self._merge = merge
