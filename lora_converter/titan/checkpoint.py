"""Checkpoints of a LoRA run: the base comes from where the user's base is, a step holds what was trained.

    base      checkpoint.initial_load_path (DCP, or Hugging Face with initial_load_in_hf); read at every start
    step-N    adapters, optimizer, scheduler, data loader and train state; no base weight
    resume    base from its source + step-N
    last step with checkpoint.last_save_in_hf, a PEFT directory instead
    merged-N  beside it with lora.save_merged, the whole model as a Hugging Face directory

A base without a source (random init) cannot be brought back by anything else, so then a step holds it too.

Every load checks all settings, keys and shapes first, on all ranks together, and names all that does not fit; that
the base is the one that the adapters were trained on is known when it is loaded, and checked before they are.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import MODEL, OPTIMIZER, TRAIN_STATE, CheckpointManager
from torchtitan.tools.logging import logger

from lora_converter.apply import adapter_parameters
from lora_converter.fingerprint import base_sums, fingerprint
from lora_converter.linear import copy_full_
from lora_converter.merge import merge_directories
from lora_converter.peft import is_peft_directory, save_peft
from lora_converter.titan.dcp_folder import ADAPTER_OPTION, BASE_OPTION, check_fits, stored_in, union_over_ranks
from lora_converter.titan.dropout import DropoutSeeds
from lora_converter.titan.faults import FaultWatch
from lora_converter.titan.hf_base import HuggingFaceBase
from lora_converter.titan.job_config import PARTS, LoRA
from lora_converter.titan.metrics import log_phase
from lora_converter.titan.optimizer import divide_pipeline_gradients
from lora_converter.titan.peft_bridge import adapted_fqns, from_peft, gather_adapter, load_peft_everywhere, to_peft
from lora_converter.titan.ranks import agreed, gather_all, together
from lora_converter.titan.run_folder import discard, has_state, newest_step, no_state, stale_steps
from lora_converter.titan.safe_dcp import load as load_dcp
from lora_converter.titan.states import ModelSubset, OptimizerState
from lora_converter.titan.step_folder import DESCRIPTION, Description, adapted_in, check_same_base, check_same_run


class LoRACheckpointManager(CheckpointManager):
    """torchtitan's checkpointer for a model with adapters; see the module docstring for what is stored where."""

    def __init__(self, dataloader, model_parts: list[nn.Module], *args: Any, **kwargs: Any):
        super().__init__(dataloader, model_parts, *args, **kwargs)
        self.settings: LoRA = model_parts[0].lora_settings  # type: ignore[assignment]
        trainer = self.states[TRAIN_STATE]  # nothing else of ours is handed the trainer
        self.parallel_dims, self.job_config, self.model_parts = trainer.parallel_dims, trainer.job_config, model_parts
        divide_pipeline_gradients(trainer)
        if self.settings.full_phase.steps > 0:
            log_phase(trainer, 2)
        trainer.metrics_processor.num_flops_per_token -= model_parts[0].lora_flops_not_spent
        self._dropout = DropoutSeeds(trainer, model_parts) if self.settings.dropout > 0 else None
        self._faults = FaultWatch(trainer, model_parts)
        self._merge: Callable[[], None] | None = None
        self._base_fingerprint = ""
        if not self.enable:
            return
        adapter_names = {name for part in model_parts for name in adapter_parameters(part)}
        self.adapters = ModelSubset(model_parts, lambda name: name in adapter_names)
        self.base = ModelSubset(model_parts, lambda name: name not in adapter_names)
        self.base_source = self._find_base_source()
        self.states[OPTIMIZER] = OptimizerState(self.states[OPTIMIZER])
        if self.base_source:
            self.states[MODEL] = self.adapters
        else:
            logger.warning(
                "LoRA: checkpoint.initial_load_path is not set, so the base stays as initialised at random; "
                "every checkpoint stores it beside the adapters."
            )

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Loads the base from its source, then the given or the newest complete step, if there is one.

        Returns:
            Whether anything was loaded.

        Raises:
            ValueError: On all ranks, if on one a folder is not there, lacks keys, has other shapes or belongs to
                another run or base; nothing but the base was loaded then.
        """
        if not self.enable:
            return False
        step = agreed(together(lambda: self._find_step(step)), f"The step to resume from in {self.folder}")
        loads: list[Callable[[], None]] = []  # every check comes before the first load
        if self.base_source:
            loads += [self._check_base(self.base_source), self._take_fingerprint]
        if step != -1:
            loads.append(self._check_step(step))
        elif self.settings.initial_adapter_path:
            loads.append(self._check_initial_adapter(self.settings.initial_adapter_path))
        for load in loads:
            load()
        if self._dropout:
            self._dropout.continue_after(max(step, 0))
        return bool(loads)

    def _find_step(self, step: int) -> int:
        if step == -1:
            step, skipped = newest_step(self.folder, last=self._last_step, needs_state=self._loads_state)
            for problem in skipped:
                logger.warning(f"LoRA: not resumed from: {problem}.")
            return step
        path = self._create_checkpoint_id(step)
        if not os.path.isdir(path):
            raise ValueError(f"checkpoint.load_step = {step}: there is no {path}. Leave it at -1 for the newest step.")
        return step

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """torchtitan's `save`, which the trainer calls after every step, unless the adapters are not finite."""
        saves = self._should_save(curr_step, last_step)
        # Step 0 is a seed checkpoint, which is saved without a step.
        if curr_step == 0 or self._faults.after_step(curr_step, saves=saves):
            super().save(curr_step, last_step)
        elif saves:
            self._async_wait()  # for the last good one
            logger.error(f"LoRA: step {curr_step} is not saved: its adapters hold nan or inf. Older steps stay.")
        if self._dropout:
            self._dropout.continue_after(curr_step)

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """torchtitan's, beside a description of the run (see `step_folder.py`), and never onto an older step."""

        def make_room() -> None:
            if dist.get_rank() == 0:
                discard(Path(checkpoint_id))
                self._description.write(checkpoint_id)

        together(make_room)
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def close(self) -> None:
        """torchtitan's, then the merged model: no rank waits for it in a collective that could time out."""
        super().close()
        if self._merge is not None:
            self._merge()
            self._merge = None

    def _save_last_step(self, curr_step: int) -> None:
        if not self.last_save_in_hf:
            super()._save_last_step(curr_step)
            return
        adapter = self._create_checkpoint_id(curr_step)
        self._export_peft(adapter)
        self._merge_at_the_end(curr_step)

    def _merge_at_the_end(self, step: int) -> None:
        if self.settings.save_merged and dist.get_rank() == 0:
            # Not step-N-merged: torchtitan takes any name with "step-" in it for a checkpoint of its own.
            merged = os.path.join(self.folder, f"merged-{step}")
            self._merge = functools.partial(self._write_merged, self._create_checkpoint_id(step), merged)

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for path in stale_steps(self.folder, keep=self.keep_latest_k, current=self.states[TRAIN_STATE].step):
                try:
                    discard(path, wholly=False)
                except OSError as e:  # somebody has made it read-only; no reason to stop
                    logger.warning(f"LoRA: {path} cannot be removed ({e}).")
                else:
                    self.purge_queue.put(str(path))

    @property
    def _description(self) -> Description:
        return Description.of_job(self.job_config, self.base_source, self._base_fingerprint)

    @property
    def _last_step(self) -> int:
        return self.job_config.training.steps

    @property
    def _loads_state(self) -> bool:
        """Whether more than the model is read of a step."""
        return any(part not in self.exclude_from_loading for part in PARTS if part != MODEL)

    def _write_merged(self, adapter: str, output: str) -> None:
        assert self.base_source is not None
        logger.info(f"LoRA: merging into {output}.")
        merge_directories(self.base_source, adapter, output, replace=True)
        logger.info(f"LoRA: wrote the merged model to {output}.")

    @torch.no_grad()
    def _export_peft(self, path: str) -> None:
        """Gathers the adapters on rank 0, which writes them as a PEFT directory. The other ranks do not wait for it."""
        assert self.sd_adapter is not None
        adapters, linears = gather_adapter(self.adapters.state_dict(), self.model_parts, self.parallel_dims)
        if dist.get_rank() == 0:
            peft = to_peft(
                self.sd_adapter,
                adapters,
                linears,
                self.settings,
                base_model=self.base_source or "",
                base_fingerprint=self._base_fingerprint,
            )
            if not is_peft_directory(path):
                discard(Path(path))
            save_peft(peft, path, dtype=self.export_dtype, replace=True)
            logger.info(f"LoRA: wrote {len(peft.factors)} adapted linears as a PEFT directory to {path}.")

    def _find_base_source(self) -> str | None:
        if self.initial_load_in_hf and self.sd_adapter is None:
            raise ValueError("checkpoint.initial_load_in_hf: the model has no StateDictAdapter. Load a DCP folder.")
        if self.initial_load_path:
            return self.initial_load_path
        return self.sd_adapter.hf_assets_path if self.initial_load_in_hf else None

    def _check_base(self, path: str) -> Callable[[], None]:
        """Checks the base folder against the model; what it returns loads it."""
        state_dict = self.base.state_dict()
        what = f"The base in {path}"
        if self.initial_load_in_hf:
            base = HuggingFaceBase(self.sd_adapter, path, state_dict, quantized=self.initial_load_in_hf_quantized)
            check_fits(base.wanted(), together(base.metadata), what)
            read = base.load
        else:
            stored = stored_in(path, BASE_OPTION)
            check_fits(state_dict, stored, what)

            def read() -> dict[str, Any]:
                load_dcp(state_dict, path, stored)
                return state_dict

        def load() -> None:
            logger.info(f"LoRA: loading the base from {path}.")
            self.base.load_state_dict(read())

        return load

    def _take_fingerprint(self) -> None:
        """Of the base that was loaded: that of all pipeline stages."""
        sums = {name: found for part in self.model_parts for name, found in base_sums(part).items()}
        if self.parallel_dims.pp_enabled:
            sums = {name: found for part in gather_all(sums) for name, found in part.items()}
        self._base_fingerprint = agreed(fingerprint(sums), "The fingerprint of the base")

    def _check_same_base(self, path: str, recorded: str) -> None:
        accept = self.settings.accept_other_base
        check_same_base(path, recorded, f"{self.base_source}", self._base_fingerprint, accept=accept)

    def _check_same_run(self, path: str, stored: Metadata) -> str:
        described = agreed(together(lambda: Description.read(path)), f"{path}/{DESCRIPTION}")
        here = union_over_ranks(adapted_fqns(self.adapters.state_dict()))
        return check_same_run(path, described, self._description, there=adapted_in(stored), here=here)

    def _check_initial_adapter(self, path: str) -> Callable[[], None]:
        """Checks another run's adapters against the model; what it returns loads them."""
        if agreed(is_peft_directory(path), f"Whether {path} is a PEFT directory"):
            return self._check_peft(path)
        stored = stored_in(path, ADAPTER_OPTION)
        base = self._check_same_run(path, stored)
        state_dict = self.adapters.state_dict()
        check_fits(state_dict, stored, f"{ADAPTER_OPTION}: {path}")

        def load() -> None:
            self._check_same_base(path, base)
            logger.info(f"LoRA: starting from the adapters in {path}.")
            load_dcp(state_dict, path, stored)
            self.adapters.load_state_dict(state_dict)

        return load

    def _check_peft(self, path: str) -> Callable[[], None]:
        """Checks a PEFT directory against the model; what it returns loads it."""
        assert self.sd_adapter is not None
        _, linears = gather_adapter({}, self.model_parts, self.parallel_dims)
        shared = [linears]
        dist.broadcast_object_list(shared)
        adapted = union_over_ranks(adapted_fqns(self.adapters.state_dict()))
        peft = load_peft_everywhere(path)
        settings = {"rank": peft.rank, "alpha": peft.alpha, "use_rslora": peft.use_rslora}
        described = replace(self._description, lora=settings)
        check_same_run(path, described, self._description, there=adapted, here=adapted)
        state_dict = from_peft(self.sd_adapter, peft, shared[0], adapted=adapted, what=path)

        def load() -> None:
            self._check_same_base(path, peft.base_fingerprint)
            logger.info(f"LoRA: starting from the PEFT adapter in {path}.")
            for name, param in self.adapters.state_dict().items():
                copy_full_(param, state_dict[name])

        return load

    def _check_step(self, step: int) -> Callable[[], None]:
        """Checks a step of this run against the model and the base source; what it returns loads it."""
        path = self._create_checkpoint_id(step)
        over = step >= self._last_step
        if agreed(over and is_peft_directory(path), f"Whether {path} is a PEFT directory"):
            return self._check_end(step, self._check_peft(path))
        stored = stored_in(path, f"checkpoint.load_step = {step}")
        names = stored.state_dict_metadata
        wants_state = step > 0 and self._loads_state  # step 0 is a seed checkpoint
        adapters_only = wants_state and over and not has_state(stored)
        model_only = step == 0 or adapters_only
        stores_base = any(name in names for name in self.base.state_dict())
        if self.base_source and stores_base:
            raise ValueError(
                f"{path} stores a base of its own (its run had no checkpoint.initial_load_path), but "
                f"{self.base_source} is given as base. Resume without a base source, or use another job.dump_folder."
            )
        if not self.base_source and not stores_base:
            raise ValueError(
                f"{path} holds adapters only. Set checkpoint.initial_load_path to the base they were trained on."
            )
        if wants_state and not over and not has_state(stored):
            raise ValueError(
                f"{no_state(path)}. To train on from its adapters, name it as lora.initial_adapter_path in a new "
                "job.dump_folder, or resume an earlier step with checkpoint.load_step."
            )
        base = ""
        if MODEL not in self.exclude_from_loading:
            base = self._check_same_run(path, stored)
            check_fits(self.states[MODEL].state_dict(), stored, path)

        def load() -> None:
            self._check_same_base(path, base)
            logger.info(f"LoRA: resuming from {path}.")
            self._load_step(self._states_to_load(model_only), path, stored)

        return self._check_end(step, load) if adapters_only else load

    def _load_step(self, states: dict[str, Any], path: str, stored: Metadata) -> None:
        load_dcp(states, path, stored)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(states)  # which torchtitan has flattened into `states`

    def _check_end(self, step: int, load: Callable[[], None]) -> Callable[[], None]:
        """Loads the adapters of a run that is over, for a job that is launched once more."""

        def load_end() -> None:
            load()
            self.states[TRAIN_STATE].step = step
            logger.info(f"LoRA: the run ended at step {step}; there is nothing left to train.")
            if not os.path.isdir(os.path.join(self.folder, f"merged-{step}")):
                self._merge_at_the_end(step)

        return load_end


def use_for_lora_models() -> None:
    """Makes every `CheckpointManager(...)` over a converted model a `LoRACheckpointManager`.

    torchtitan 0.2.2 has no setting for the checkpointer's class, and the trainer finds the name in its own module,
    which is `__main__` under `-m torchtitan.train`; so the choice is made where all of them meet, in `__new__`.
    Remove when TrainSpec can name a checkpointer. Other models get torchtitan's own.
    """
    CheckpointManager.__new__ = staticmethod(_new_manager)  # type: ignore[assignment]


def _new_manager(cls: type, dataloader=None, model_parts: Any = (), *args: Any, **kwargs: Any) -> CheckpointManager:
    # Asked of the model and not of its linears: a pipeline stage may have no adapter.
    converted = any(hasattr(part, "lora_settings") for part in model_parts)
    if converted and cls is not CheckpointManager and not issubclass(cls, LoRACheckpointManager):
        raise ValueError(
            f"{cls.__name__} cannot checkpoint a model with adapters. Derive it from "
            "lora_converter.titan.checkpoint.LoRACheckpointManager, or use torchtitan's own."
        )
    return object.__new__(LoRACheckpointManager if converted and cls is CheckpointManager else cls)
