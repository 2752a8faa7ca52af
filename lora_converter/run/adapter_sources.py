"""Adapters from elsewhere: another run's step folder, or a PEFT directory. `check`, then `load`, as all sources.

AdapterSource    another run's step folder: its adapters alone
PeftSource       a PEFT directory
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from lora_converter.adapted import check_peft_forms
from lora_converter.config import LoRAConfig
from lora_converter.dcp.folder import check_fits, stored_in
from lora_converter.dcp.reader import load as load_dcp
from lora_converter.dora import DoRALinear
from lora_converter.fit import Misfit
from lora_converter.hf.bridge import from_peft
from lora_converter.hf.expert_bridge import host_experts
from lora_converter.hf.magnitudes import magnitude_changes
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.peft_adapter import base_weights_in_training
from lora_converter.hf.saved_modules import is_same_weight, modules_of_keys
from lora_converter.offset import undo_plain
from lora_converter.ranks import agreed, together, union_over_ranks
from lora_converter.run.base_identity import (
    PackedWeights,
    check_same_base,
    check_same_converters,
    check_same_format,
)
from lora_converter.run.description import (
    DESCRIPTION,
    Description,
    check_same_run,
)
from lora_converter.run.initial_factors import InitialFactors
from lora_converter.run.model import RunModel
from lora_converter.run.peft_io import load_peft_everywhere, trained_in
from lora_converter.run.rows_of_tokens import rows_of_tokens
from lora_converter.run.steps import Step, adapters_in
from lora_converter.tensors import copy_full_, full_tensor, reshard

logger = logging.getLogger(__name__)

ADAPTER_OPTION = "lora.initial_adapter_path"

_WORDS = {"misshapen": "have another shape"}


class AdapterSource:
    """The adapters of another run's step folder."""

    def __init__(self, model: RunModel, path: str):
        self._model, self._path = model, path

    def check(self) -> None:
        """Compares settings, keys and shapes."""
        hint = "It has no adapter_config.json either, so it is no PEFT directory."
        stored = self._model.host_names.of_step(stored_in(self._path, ADAPTER_OPTION, hint=hint))
        _check_has_base(self._model, self._path, stored.state_dict_metadata)
        description = together(lambda: Description.read(self._path))
        self._step = Step(0, Path(self._path), stored, description=description)
        self._base_fingerprint = check_run_of_step(self._model, self._step)
        check_fits(self._model.adapters.state_dict(), stored, f"{ADAPTER_OPTION}: {self._path}")

    def load(self) -> None:
        """Loads the adapters alone."""
        assert self._step.stored is not None
        check_base_of_adapter(self._model, self._path, self._base_fingerprint)
        logger.info(f"LoRA: starting from the adapters in {self._path}.")
        state_dict = self._model.adapters.state_dict()
        load_dcp(state_dict, self._path, self._step.stored)
        self._model.adapters.load_state_dict(state_dict)


class PeftSource:
    """A PEFT directory.

    Args:
        of_run: It is what this run has written at its end; with `init` that is a plain adapter.
    """

    def __init__(self, model: RunModel, path: str, *, of_run: bool = False):
        self._model, self._path, self._of_run = model, path, of_run
        self._init = model.host.job.config.init

    def check(self) -> None:
        """Compares settings, names and shapes."""
        model, adapter = self._model, self._model.host.naming
        assert adapter is not None
        _check_has_base(model, self._path)
        check_peft_forms_everywhere(model)
        names, linears, configs = model.peft_names(), model.linear_shapes(), model.configs()
        config: LoRAConfig = model.host.job.config
        if self._of_run:
            configs, config = {fqn: own.of_plain() for fqn, own in configs.items()}, config.of_plain()
        adapted, experts = model.adapted_fqns(), model.expert_shapes()
        stored = host_experts(adapter, experts)
        peft = load_peft_everywhere(self._path, adapter, linears, stored)
        if peft.base_fingerprint:  # made by a run like this, which says what its base was packed as
            forms: PackedWeights = dict.fromkeys((form for form, _ in model.packed.values()), ())
            was: PackedWeights = {peft.packed.form: ()} if peft.packed else {}
            check_same_format(self._path, was, forms, accept=model.host.job.config.accept_other_base)
        description = model.description
        # Patterns: by `from_peft`.
        copies, trained = _copies_of_base(adapter, peft.base_weights, self._path), model.trained_names()
        # Of what the job trains beside, the directory may have less: that starts from the base.
        in_full = {*modules_of_keys(trained), *(trained_in(peft, adapter) if copies else ())}
        there = replace(description, lora={**description.lora, **peft.settings, "train_also": sorted(in_full)})
        own = {name: getattr(config, name) for name in peft.settings}
        here = replace(description, lora={**description.lora, **own, "train_also": modules_of_keys(trained)})
        check_same_run(self._path, there, here, there=adapted, here=adapted, experts=experts, base=model.base_names())
        self._rows = rows_of_tokens(model, peft, adapter, copies, self._path)
        self._copies = {name: value for name, value in copies.items() if name not in trained}
        self._trained = {name: value for name, value in copies.items() if name in trained}
        misfit = Misfit()
        for name, param in model.adapters.state_dict().items():
            misfit.compare(name, self._trained.get(name, param).shape, param.shape)
        together(lambda: misfit.raise_if_any(f"{self._path} does not fit the model.", words=_WORDS))
        of_weights = {weight: configs[weight.rpartition(".")[0]] for weight in names}
        self._state_dict, self._magnitudes = from_peft(
            adapter, peft, names, linears, configs=of_weights, what=self._path, experts=stored
        )
        if self._of_run and self._init:
            undo_plain(self._state_dict)
        self._base_fingerprint = peft.base_fingerprint

    def load(self) -> None:
        """Copies each rank's part, once the base is known to be the adapter's."""
        check_base_of_adapter(self._model, self._path, self._base_fingerprint)
        _check_copies(self._model, self._copies, self._path)
        logger.info(f"LoRA: starting from the PEFT adapter in {self._path}.")
        if self._init and not self._of_run:  # what its factors began at is the base's, as PEFT computes it again too
            InitialFactors(self._model).load()
        with_magnitude = [module for module in self._model.adapted if isinstance(module, DoRALinear)]
        self._state_dict |= magnitude_changes(with_magnitude, self._magnitudes)
        for name, param in self._model.adapters.state_dict().items():
            value = self._state_dict.get(name, self._trained.get(name))
            if value is not None:  # else of train_also or new_tokens, and the base's is there
                copy_full_(param, value)
        for part in self._model.parts if self._rows else ():
            reshard(part)
        for weight, module in self._model.token_modules().items():
            if weight in self._rows:
                module.set_whole_rows(self._rows[weight].rows, self._rows[weight].ids)


def _copies_of_base(
    adapter: StateDictAdapter, base_weights: dict[str, torch.Tensor], path: str
) -> dict[str, torch.Tensor]:
    """The weights of a base that an adapter brings, in the host's names."""
    try:
        return adapter.from_hf(base_weights) if base_weights else {}
    except Exception as e:  # whatever a host's adapter does with keys that it does not know
        raise ValueError(f"{base_weights_in_training(path, base_weights)} (The host does not know them: {e!r})") from e


def _check_copies(model: RunModel, copies: dict[str, torch.Tensor], path: str) -> None:
    """Refuses an adapter that brings other weights than the base has that is loaded."""
    if not copies:
        return
    here = {name: full_tensor(value) for name, value in model.base.state_dict().items() if name in copies}
    other = [name for name, value in here.items() if not is_same_weight(copies[name].to(value.device), value)]
    unknown = sorted(copies.keys() - set(union_over_ranks(list(here))))
    if found := union_over_ranks(other) + unknown:
        raise ValueError(base_weights_in_training(path, found))
    logger.info(f"LoRA: {', '.join(copies)} of {path} are the base's own, and dropped.")


def _check_has_base(model: RunModel, path: str, stored: Iterable[str] = ()) -> None:
    """Refuses adapters in a job whose base is random, which is not the one that they were trained on."""
    job = model.host.job
    if job.base is None and not job.config.accept_other_base:
        itself = f": {path} itself, which stores it" * bool(set(stored) & set(model.base_names()))
        raise ValueError(
            f"{ADAPTER_OPTION}: {path} was not trained on this job's base, which is random. Set "
            f"checkpoint.initial_load_path to the base it was trained on{itself}."
        )


def check_peft_forms_everywhere(model: RunModel) -> None:
    """Refuses a run with adapters that PEFT has no form for, on all ranks."""
    together(lambda: check_peft_forms(model.adapted))


def check_run_of_step(model: RunModel, step: Step) -> str:
    """Refuses a step of another run. Returns the fingerprint of its base."""
    assert step.stored is not None
    described = agreed(step.description, f"{step.path}/{DESCRIPTION}")
    there, foreign = adapters_in(step.stored, model.kinds, model.base_names(), ours=model.adapter_names())
    here, experts, name = model.adapted_fqns(), model.expert_shapes(), model.host.canonical_name
    if described is not None:
        job, path, accept = model.host.job, f"{step.path}", model.host.job.config.accept_other_base
        check_same_format(path, described.packed, model.description.packed, accept=accept)
        check_same_converters(path, described.converters, job.converters, accept=accept)
    return check_same_run(
        f"{step.path}",
        described,
        model.description,
        there=map(name, there),
        here=map(name, here),
        experts={*map(name, experts)},
        foreign=foreign,
        base=map(name, model.base_names()),
    )


def check_base_of_adapter(model: RunModel, path: str, recorded: str) -> None:
    job = model.host.job
    source = job.base.path if job.base else "None"
    check_same_base(path, recorded, source, model.base_fingerprint, accept=job.config.accept_other_base)
