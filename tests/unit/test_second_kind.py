"""A kind of adapted module that the package does not know: it trains a bias. The protocol carries it everywhere."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from test_plain_host import PlainHost, X, base, make_model  # noqa: F401  a fixture

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    count_parameters,
    disable_adapter,
    freeze_base,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    split_state_dict,
    unmerge_adapter,
)
from lora_converter.adapted import AdaptedModule, adapt
from lora_converter.peft import from_model
from lora_converter.run.job import Job
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack
from lora_converter.tensors import copy_full_, full_tensor, local_part, shard_like


class BiasAdapter(AdaptedModule):
    """y = base(x) + shift, for a linear with a bias."""

    adapter_kind = "biases"
    adapter_parameter_names = ("shift",)
    zero_at_start = ("shift",)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        return out + self.shift if self.is_active else out

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        copy_full_(self.shift, torch.zeros(self.shift.shape))

    def merged_names(self) -> list[str]:
        return ["bias"]

    def local_updates(self, weight: str) -> Iterator[torch.Tensor]:
        yield local_part(shard_like(full_tensor(self.shift), self.bias)).float()

    def remove_adapter(self) -> None:
        del self.shift


def add_biases(model: nn.Module, names: Iterable[str], config: LoRAConfig) -> None:
    """Puts the kind on, beside whatever adapters there are."""
    for name in names:
        adapted = adapt(model.get_submodule(name), BiasAdapter, config, fqn=name)
        adapted.shift = nn.Parameter(torch.zeros_like(adapted.bias))
    freeze_base(model)


class MixedHost(PlainHost):
    """A low-rank adapter on the first linear, a bias on the second one."""

    def convert(self, model: nn.Module) -> None:
        apply_lora(model, self.job.config, seed=self.job.seed)
        add_biases(model, ["2"], self.job.config)


MIXED = {"exclude_modules": ["2"]}


def test_it_trains_saves_and_resumes(base: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = MixedHost(tmp_path / "whole", base=base, **MIXED).train()
    first = MixedHost(tmp_path / "parts", base=base, **MIXED).train(to=2)
    second = MixedHost(tmp_path / "parts", base=base, **MIXED).train()
    assert first.losses + second.losses == whole.losses and whole.losses[-1] < whole.losses[0]
    expected, found = (adapter_state_dict(host.model_parts[0]) for host in (whole, second))
    assert expected.keys() == {"0.lora_a.weight", "0.lora_b.weight", "2.shift"} and expected["2.shift"].any()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_without_it_does_not_go_on_from_its_steps_and_the_other_way_round(
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    MixedHost(tmp_path / "mixed", base=base, **MIXED).train(to=2)
    with pytest.raises(ValueError, match=r"other settings: 1 entries are there alone: 2\.shift"):
        PlainHost(tmp_path / "mixed", base=base, **MIXED).train()
    PlainHost(tmp_path / "plain", base=base, **MIXED).train(to=2)
    with pytest.raises(ValueError, match=r"other settings: 1 modules are adapted only here: plain.2"):
        MixedHost(tmp_path / "plain", base=base, **MIXED).train()


def mixed_model() -> nn.Module:
    model, config = make_model(0), LoRAConfig(rank=2, exclude_modules=["2"])
    apply_lora(model, config)
    add_biases(model, ["2"], config)
    with torch.no_grad():
        for number, param in enumerate(adapter_parameters(model).values()):
            param.normal_(generator=torch.Generator().manual_seed(number))
    return model


def test_it_is_disabled_merged_taken_back_and_merged_for_good() -> None:
    model, plain = mixed_model(), make_model(0)
    with torch.no_grad():
        base_out, out = plain(X), model(X)
        assert not torch.allclose(base_out, out)
        with disable_adapter(model):
            assert torch.equal(model(X), base_out)
        merge_adapter(model)
        torch.testing.assert_close(model(X), out)
        unmerge_adapter(model)
        assert torch.equal(model(X), out)
        merge_and_unload(model)
        torch.testing.assert_close(model(X), out)
    assert type(model[2]) is nn.Linear and model.state_dict().keys() == plain.state_dict().keys()


def test_it_is_counted_split_off_shipped_and_loaded() -> None:
    model, other = mixed_model(), mixed_model()
    assert count_parameters(model).kinds == {"linears": 1, "biases": 1}
    adapters, rest = split_state_dict(model.state_dict(), model)
    assert "2.shift" in adapters and rest.keys() == make_model(0).state_dict().keys()
    with torch.no_grad():
        model[2].shift.fill_(7.0)
    AdapterReceiver(other, base="it").receive(pack(model, version=1, base="it"))
    assert torch.equal(other[2].shift, model[2].shift)
    load_adapter_state_dict(other, adapter_state_dict(mixed_model()))
    assert not torch.equal(other[2].shift, model[2].shift)


def test_a_fault_of_it_is_reported_by_name(
    base: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = MixedHost(tmp_path, base=base, **MIXED)
    host.model_parts[0][2].lora_enabled = False
    host.train()
    assert "1 adapters got no gradient in the whole step; is their part of the model used?: 2." in caplog.text
    assert "1 adapters are still zero, so they change nothing; is the learning rate above 0?: 2." in caplog.text
    host.model_parts[0][2].shift.data.fill_(torch.nan)
    assert not host.run.after_step(5, saves=True)
    assert "1 adapters hold nan or inf: 2." in caplog.text


def test_peft_and_increments_refuse_it_by_name(base: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"^PEFT has no form for 1 adapted modules \(biases\): 2\. Keep"):
        from_model(mixed_model())

    class Exporting(MixedHost):
        def convert(self, model: nn.Module) -> None:
            super().convert(model)
            self.job = Job(**{**vars(self.job), "exports_peft": True})

    with pytest.raises(ValueError, match=r"PEFT has no form for 1 adapted modules \(biases\): 2\. Keep"):
        Exporting(tmp_path, base=base, **MIXED)
    plain = make_model(0)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(ValueError, match=r"2 is adapted by shift, which is no increment of a weight"):
        IncrementReceiver(plain, base="it").receive(pack(mixed_model(), version=1, base="it"))
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
