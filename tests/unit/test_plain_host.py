"""`run/` on a host that is no torchtitan: sixty lines of trainer over two linears, in plain PyTorch."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn

from lora_converter import adapter_parameters, adapter_state_dict, apply_lora, freeze_base
from lora_converter.adapters import reset_adapters
from lora_converter.dcp.states import OptimizerState
from lora_converter.run.job import Base, Job, RunConfig
from lora_converter.run.run import Run

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


class PlainHost:
    """A `Host` and its trainer: fits the adapters to zero, one step per call of `train_step`, each step saved."""

    def __init__(self, folder: Path, *, base: Path | None, steps: int = 4, init: int = 7, **config: Any):
        self.job = Job("plain", "tiny", RunConfig(rank=2, **config), seed=3, steps=steps, folder=str(folder))
        self.job = Job(**{**vars(self.job), "base": Base(str(base)) if base else None})
        model = make_model(init)  # other weights than the base's, until that is loaded
        self.model_parts, self.meshes, self.data_rank = [model], {}, 0
        self.adapters_made_in = 0.0
        self.state_dict_adapter = self.naming = None
        self.after_logging: list[Callable[[float], None]] = []
        self.step, self.losses = 0, []
        self.convert(model)
        self.optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.1)
        self.optimizers, self.lr_schedulers = [self.optimizer], []
        self.states = {"optimizer": OptimizerState([model], [self.optimizer]), "train_state": self}
        self.run = Run(self)

    def convert(self, model: nn.Module) -> None:
        apply_lora(model, self.job.config, seed=self.job.seed, canonical_name=self.canonical_name)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]

    def canonical_name(self, fqn: str) -> str:
        return f"plain.{fqn}"

    def on_log(self, look: Callable[[float], None]) -> None:
        self.after_logging.append(look)

    def around_trial_forwards(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """It makes none."""

    def end_at(self, step: int) -> None:
        self.step = step

    def end_process(self, exit_code: int) -> NoReturn:
        self.run.finish()
        raise SystemExit(exit_code)

    def train(self, to: int | None = None) -> "PlainHost":
        model = self.model_parts[0]
        self.run.load()
        while self.step < (to or self.job.steps):
            self.step += 1
            self.optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(list(adapter_parameters(model).values()), 1.0)
            self.optimizer.step()
            self.losses.append(loss.item())
            for look in self.after_logging:
                look(norm.item())
            ends = self.run.ends_after(self.step)
            if self.run.after_step(self.step, saves=True):
                path = self.run.step_path(self.step)
                self.run.prepare_step(path)
                dcp.save({**self.states, **self.run.model.stored.state_dict()}, checkpoint_id=path, no_dist=True)
            if ends:
                self.run.end(self.step)
        self.run.finish()
        return self


@pytest.fixture
def base(tmp_path: Path) -> Path:
    dcp.save(make_model(0).state_dict(), checkpoint_id=tmp_path / "base", no_dist=True)
    return tmp_path / "base"


def test_a_run_is_stopped_and_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    whole = PlainHost(tmp_path / "whole", base=base).train()
    first = PlainHost(tmp_path / "parts", base=base).train(to=2)
    second = PlainHost(tmp_path / "parts", base=base, init=9).train()
    assert first.losses + second.losses == whole.losses and len(second.losses) == 2
    expected, found = (adapter_state_dict(host.model_parts[0]) for host in (whole, second))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    stored = dcp.FileSystemReader(tmp_path / "whole" / "step-4").read_metadata().state_dict_metadata
    assert {name for name in stored if not name.startswith(("optimizer.", "train_state."))} == expected.keys()


def test_a_finished_run_has_nothing_left_and_a_random_base_comes_back(tmp_path: Path) -> None:
    first = PlainHost(tmp_path, base=None).train()
    again = PlainHost(tmp_path, base=None, init=9).train()
    assert again.losses == [] and again.step == 4
    assert torch.equal(first.model_parts[0](X), again.model_parts[0](X))


def test_other_settings_and_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    PlainHost(tmp_path / "run", base=base).train(to=2)
    with pytest.raises(ValueError, match=r"trained with other settings: lora\.alpha is 32\.0 there and 8\.0 here"):
        PlainHost(tmp_path / "run", base=base, alpha=8.0).train()
    dcp.save(make_model(1).state_dict(), checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ValueError, match=r"was trained on a base with fingerprint"):
        PlainHost(tmp_path / "run", base=tmp_path / "other").train()
    dcp.save({"0.weight": torch.zeros(3, 3)}, checkpoint_id=tmp_path / "wrong", no_dist=True)
    with pytest.raises(ValueError, match=r"3 keys are missing: 0\.bias, 2\.weight, 2\.bias\. 1 keys have another"):
        PlainHost(tmp_path / "fresh", base=tmp_path / "wrong").train()


def test_seeds_and_fingerprints_go_by_canonical_names(base: Path, tmp_path: Path) -> None:
    """Two hosts with other names for one model, and one canonical name, give one adapter and one fingerprint."""

    class Renamed(PlainHost):
        def convert(self, model: nn.Module) -> None:
            self.model_parts = [nn.ModuleDict({"net": model})]
            apply_lora(self.model_parts[0], self.job.config, seed=self.job.seed, canonical_name=self.canonical_name)

        def canonical_name(self, fqn: str) -> str:
            return "plain." + fqn.removeprefix("net.")

    ours = PlainHost(tmp_path / "a", base=base)
    names = {f"net.{name}": value for name, value in make_model(0).state_dict().items()}
    dcp.save(names, checkpoint_id=tmp_path / "renamed", no_dist=True)
    theirs = Renamed(tmp_path / "b", base=tmp_path / "renamed")
    for host in (ours, theirs):
        host.run.load()
    a, b = (adapter_state_dict(host.model_parts[0]) for host in (ours, theirs))
    assert [*b] == [f"net.{name}" for name in a] and all(map(torch.equal, a.values(), b.values()))
    assert ours.run.model.base_fingerprint == theirs.run.model.base_fingerprint != ""
    plain = make_model(0)
    apply_lora(plain, ours.job.config, seed=3)
    assert not torch.equal(plain[0].lora_a.weight, a["0.lora_a.weight"])  # its canonical name is another


def test_each_file_of_a_start_is_read_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PlainHost(tmp_path / "run", base=base).train(to=2)
    read: list[str] = []
    for method in ("read_bytes", "read_text"):
        original = getattr(Path, method)

        def counted(path: Path, *args: Any, original: Callable = original, **kwargs: Any) -> Any:
            if path.is_relative_to(tmp_path):
                read.append(f"{path.relative_to(tmp_path)}")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, counted)
    PlainHost(tmp_path / "run", base=base).run.load()
    assert sorted(read) == ["base/.metadata", "run/step-2/.metadata", "run/step-2/lora.json"]


def test_what_an_export_would_make_inf_keeps_its_dtype_to_be_refused_by_name(base: Path, tmp_path: Path) -> None:
    host = PlainHost(tmp_path / "run", base=base)
    with torch.no_grad():
        host.model_parts[0][2].lora_b.weight.fill_(1e6)
    gathered = host.run.model.gather_adapters(torch.float16)
    assert gathered.pop("2.lora_b.weight").double().eq(1e6).all()
    assert len(gathered) == 3 and {value.dtype for value in gathered.values()} == {torch.float16}


def test_adapters_are_reset_and_frozen_by_what_a_host_calls(tmp_path: Path) -> None:
    """What a host does that builds on the meta device: values come after the weights, `requires_grad` last."""
    with torch.device("meta"):
        model = make_model(0)
    apply_lora(model, RunConfig(rank=2), seed=3)
    model.to_empty(device="cpu").requires_grad_(True)
    reset_adapters(model, seed=3)
    freeze_base(model)
    real = make_model(0)
    apply_lora(real, RunConfig(rank=2), seed=3)
    expected, found = adapter_state_dict(real), adapter_state_dict(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected.keys()


def test_all_of_this_needs_no_torchtitan() -> None:
    code = "import sys, pytest\nsys.modules['torchtitan'] = None\n"
    code += f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not no_torchtitan', {__file__!r}]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert json.loads(f"[{result.stdout.rsplit(' passed', 1)[0].split()[-1]}]") == [7]
