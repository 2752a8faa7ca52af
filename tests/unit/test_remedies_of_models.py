"""What a message says to do with a model in memory: it is done, and the trouble is gone."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from test_second_kind import mixed_model

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    adapter_state_dict,
    apply_lora,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    unload_adapter,
    unmerge_adapter,
)
from lora_converter.peft import from_model, into_model
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


def adapted(model: nn.Module | None = None, *, fill: int = 0, **settings: object) -> nn.Module:
    model = make() if model is None else model
    apply_lora(model, LoRAConfig(**{"rank": 2, "alpha": 4.0, **settings}))
    with torch.no_grad():
        for number, param in enumerate(adapter_parameters(model).values()):
            param.normal_(generator=torch.Generator().manual_seed(number + fill))
    return model


# Selection


def test_target_modules_that_are_empty_name_a_linear_or_use_all_linear() -> None:
    with pytest.raises(ValueError, match=r"is empty: name at least one linear, or use 'all-linear'\."):
        LoRAConfig(target_modules=[])
    for targets, count in ((["2.1"], 1), (["all-linear"], 3)):
        assert len(apply_lora(make(), LoRAConfig(target_modules=targets))) == count


@pytest.mark.parametrize("kept", ["2.*", "2.0"])
def test_of_two_patterns_that_disagree_one_is_kept(kept: str) -> None:
    patterns = {"2.*": 4, "2.0": 5}
    with pytest.raises(ValueError, match=r"Keep one\."):
        apply_lora(make(), LoRAConfig(rank=2, rank_pattern=patterns))
    model = make()
    apply_lora(model, LoRAConfig(rank=2, rank_pattern={kept: patterns[kept]}))
    ranks = [linear.lora_config.rank for linear in (model[0], *model[2])]
    assert ranks == ([2, 4, 4] if kept == "2.*" else [2, 5, 2])


def test_linears_that_are_never_called_are_excluded_or_others_named() -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()

    with pytest.raises(
        ValueError, match=r"read without calling .* Name other linears, or add them to exclude_modules\."
    ):
        apply_lora(encoder(), LoRAConfig(target_modules=["0", "linear1", "out_proj"]))
    for settings in (
        {"target_modules": ["0"]},
        {"target_modules": ["0", "linear1", "out_proj"], "exclude_modules": ["1.*"]},
    ):
        model = adapted(encoder(), **settings)
        assert model[0].lora_config.rank == 2 and not torch.equal(model(X[None]), encoder()(X[None]))


# A forward that is replaced


def doubled(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def test_adapters_are_put_on_before_a_forward_is_replaced() -> None:
    model = make()
    doubled(model[2][1])
    with pytest.raises(ValueError, match=r"2\.1 has a forward of its own .* Put adapters on before it is replaced"):
        adapted(model)
    expected, model = adapted(), adapted()
    doubled(model[2][1])
    assert torch.equal(model(X), 2 * expected(X))
    model(X).sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in adapter_parameters(model).values())


def test_a_module_whose_forward_was_replaced_is_left_out() -> None:
    model = make()
    doubled(model[2][1])
    with pytest.raises(ValueError, match=r"or leave the module out\."):
        adapted(model)
    assert torch.equal(adapted(model, exclude_modules=["2.1"])(X), 2 * adapted(exclude_modules=["2.1"])(X))


# One weight, two owners


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def untie(model: nn.Module) -> nn.Module:
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    return model


def test_a_shared_weight_is_untied_before_it_is_merged_or_merged_for_good() -> None:
    expected = adapted(tied(), target_modules=["1"])(X)
    model = adapted(tied(), target_modules=["1"])
    with pytest.raises(
        ValueError,
        match=r"1\.weight is 0\.weight as well\. Untie them first, or use merge_and_unload on an unsharded model",
    ):
        merge_adapter(model)
    for way, other in ((merge_adapter, untie(copy.deepcopy(model))), (merge_and_unload, model)):
        way(other)
        torch.testing.assert_close(other(X), expected)
        assert torch.equal(other[0].weight, tied()[0].weight)


def test_a_receiver_whose_weights_are_shared_receives_once_they_are_untied() -> None:
    sender = adapted(tied(), target_modules=["1"])
    package = pack(sender, version=0, base="it")
    receiver = IncrementReceiver(tied(), base="it")
    with pytest.raises(ValueError, match="Untie them first"):
        receiver.receive(package)
    receiver = IncrementReceiver(untie(tied()), base="it")
    receiver.receive(package)
    torch.testing.assert_close(receiver.model(X), sender(X))


# Adapters that are there already, or merged


def test_a_second_adapter_is_loaded_into_the_first_or_put_on_once_that_is_off() -> None:
    other = adapted(fill=100)
    model = adapted()
    with pytest.raises(ValueError, match=r"load another adapter into them, or take them off with unload_adapter\."):
        apply_lora(model, LoRAConfig(rank=2, alpha=4.0))
    load_adapter_state_dict(model, adapter_state_dict(other))
    assert torch.equal(model(X), other(X))
    unload_adapter(model)
    assert torch.equal(adapted(model, fill=100)(X), other(X))


def test_what_is_merged_is_taken_back_before_it_is_merged_again_or_disabled() -> None:
    expected, model = adapted()(X), adapted()
    merge_adapter(model)
    with pytest.raises(ValueError, match=r"unmerge_adapter first\."):
        merge_adapter(model)
    with pytest.raises(ValueError, match=r"unmerge_adapter first\."), disable_adapter(model):
        pass
    unmerge_adapter(model)
    with disable_adapter(model):
        assert torch.equal(model(X), make()(X))
    merge_adapter(model)
    torch.testing.assert_close(model(X), expected)


def test_what_is_not_merged_is_merged_before_it_is_taken_back() -> None:
    expected, model = adapted()(X), adapted()
    with pytest.raises(ValueError, match=r"merge_adapter first\."):
        unmerge_adapter(model)
    merge_adapter(model)
    unmerge_adapter(model)
    assert torch.equal(model(X), expected)


def test_another_scaling_is_given_to_apply_lora_or_its_patterns() -> None:
    adapter = from_model(adapted(rank=3, alpha=7.0, use_rslora=True))
    other = adapted(rank=3, alpha=6.0)
    with pytest.raises(ValueError) as error:
        into_model(adapter, other)
    assert "give apply_lora rank = 3, alpha = 7, use_rslora = True, or the like in its patterns." in str(error.value)
    told = str(error.value).split("give apply_lora ")[1].removesuffix(", or the like in its patterns.")
    settings = dict(pair.split(" = ") for pair in told.split(", "))
    rank, alpha = int(settings["rank"]), float(settings["alpha"])
    rslora = settings["use_rslora"] == "True"
    every = {name: rank for name in ("0", "2.0", "2.1")}
    for given in (
        {"rank": rank, "alpha": alpha},
        {"rank": 2, "alpha": 1.0, "rank_pattern": every, "alpha_pattern": dict.fromkeys(every, alpha)},
    ):
        model = adapted(use_rslora=rslora, fill=50, **given)
        into_model(adapter, model)
        torch.testing.assert_close(model(X), adapted(rank=3, alpha=7.0, use_rslora=True)(X))


# Kinds that PEFT has no form for


def test_a_kind_without_a_form_in_peft_is_left_out_of_what_is_exported() -> None:
    with pytest.raises(ValueError, match=r"Keep such adapters in step folders, or leave them out\."):
        from_model(mixed_model())
    model = make()
    adapted(model, exclude_modules=["2.*"])
    assert set(from_model(model).factors) == {"0"}


# Packages


def test_a_damaged_package_is_sent_again_and_one_of_another_base_made_for_this_one() -> None:
    sender, receiver = adapted(), AdapterReceiver(adapted(fill=9), base="it")
    good = pack(sender, version=0, base="it")
    for data, message in (
        (good[:-1] + bytes([good[-1] ^ 1]), r"The package is damaged: its checksum is another\. Have it sent again\."),
        (good[:100], r"Have it sent again\."),
        (pack(sender, version=0, base="other"), "is for base 'other', this model's is 'it'"),
    ):
        with pytest.raises(ValueError, match=message):
            receiver.receive(data)
    assert receiver.receive(good) == 0 and torch.equal(receiver.model(X), sender(X))
    assert all(map(math.isfinite, receiver.model(X).flatten().tolist()))
