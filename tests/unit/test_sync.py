"""Packages of adapters: whole or refused, small, and without drift at the receiver."""

import copy
import random
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import TINY  # noqa: F401  (chooses the device before torchtitan is imported)
from torchtitan.models.llama3 import Transformer, llama3_args

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
)
from lora_converter.fingerprint import base_fingerprint
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import pack_linear
from lora_converter.sync import (
    AdapterReceiver,
    IncrementReceiver,
    pack,
    unpack,
    write_file,
)

CONFIG = LoRAConfig(rank=3, alpha=6.0)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4, bias=False))


def trainer(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = plain().to(dtype)
    apply_lora(model, CONFIG)
    return model


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in adapter_parameters(model).values():
        param.data.copy_(torch.randn(param.shape, generator=generator))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_a_package_says_what_was_packed() -> None:
    model = trainer()
    train(model, 0)
    package = unpack(pack(model, version=7, base="abc"))
    assert (package.version, package.base, package.scalings) == (7, "abc", {"0": 2.0, "2": 2.0})
    expected = adapter_state_dict(model)
    assert package.tensors.keys() == expected.keys()
    assert all(torch.equal(package.tensors[name], value) for name, value in expected.items())


def test_a_model_with_adapters_gets_the_senders() -> None:
    sender, twin = trainer(), trainer()
    receiver = AdapterReceiver(twin)
    for version in range(3):
        train(sender, version)
        assert receiver.receive(pack(sender, version=version, base=base_fingerprint(sender))) == version
        assert torch.equal(twin(X), sender(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_updates_of_a_plain_model_are_the_last_one_alone(dtype: torch.dtype) -> None:
    sender = trainer(dtype)
    often, once = plain().to(dtype), plain().to(dtype)
    receivers = [IncrementReceiver(often), IncrementReceiver(once)]
    for version in range(100):
        train(sender, version)
        data = pack(sender, version=version, base=base_fingerprint(sender))
        receivers[0].receive(data)
    receivers[1].receive(data)
    assert all(torch.equal(a, b) for a, b in zip(often.parameters(), once.parameters(), strict=True))
    if dtype is torch.float32:
        torch.testing.assert_close(often(X), sender(X))
    assert not torch.equal(often[0].weight, plain()[0].weight.to(dtype))


def test_a_linear_that_is_no_longer_adapted_gets_its_own_weight_back() -> None:
    model = plain()
    receiver = IncrementReceiver(model, base="b")
    both, one = trainer(), plain()
    apply_lora(one, LoRAConfig(rank=3, alpha=6.0, target_modules=["2"]))
    for version, sender in enumerate([both, one]):
        train(sender, version)
        receiver.receive(pack(sender, version=version, base="b"))
    assert torch.equal(model[0].weight, plain()[0].weight) and not torch.equal(model[2].weight, plain()[2].weight)


@pytest.mark.parametrize("kind", [AdapterReceiver, IncrementReceiver])
def test_what_is_stale_foreign_damaged_or_does_not_fit_is_refused_whole(kind: type) -> None:
    sender = trainer()
    model = trainer() if kind is AdapterReceiver else plain()
    receiver = kind(model)
    train(sender, 0)
    base = base_fingerprint(sender)
    receiver.receive(pack(sender, version=5, base=base))
    before = copy.deepcopy(model.state_dict())
    train(sender, 1)
    good = pack(sender, version=6, base=base)
    wide = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(12, 4))
    apply_lora(wide, CONFIG)
    refused = {
        r"has version 5, the model version 5 already": pack(sender, version=5, base=base),
        r"has version 4, the model version 5 already": pack(sender, version=4, base=base),
        rf"is for base 'other', this model's is '{base}'": pack(sender, version=6, base="other"),
        r"The package is damaged: its checksum is another": good[:-1] + bytes([good[-1] ^ 1]),
        r"no package of adapters, or a damaged one": good[:100],
        r"in the package|another shape": pack(wide, version=6, base=base),
    }
    for message, data in refused.items():
        with pytest.raises(ValueError, match=message):
            receiver.receive(data)
        assert receiver.version == 5
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert receiver.receive(good) == 6


def test_packed_and_dense_models_exchange_adapters_and_nothing_is_merged_into_packed_weights() -> None:
    """Linears beside the packed one are not, so that something could be left half done."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
    packed = copy.deepcopy(dense)
    pack_linear(packed[2], form="nf4", fqn="2")
    dense[2].weight.data = FORMATS["nf4"].unpack(packed[2].weight, torch.float32)
    plain_packed, plain_dense = copy.deepcopy(packed), copy.deepcopy(dense)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    before = packed(x)
    for model in (dense, packed):
        apply_lora(model, CONFIG)
    base = base_fingerprint(packed)
    for version, (sender, server) in enumerate([(packed, dense), (dense, packed)]):
        train(sender, version)
        package = pack(sender, version=version, base=base)
        AdapterReceiver(server).receive(package)
        torch.testing.assert_close(server(x), sender(x), rtol=1e-5, atol=1e-5)
        IncrementReceiver(plain_dense, base=base).receive(package)
        torch.testing.assert_close(plain_dense(x), sender(x), rtol=1e-5, atol=1e-5)
        plain_dense = unload_adapter(copy.deepcopy(dense))

    expected, state = packed(x), adapter_state_dict(packed)
    train(packed, 9)
    assert not torch.equal(packed(x), expected)
    load_adapter_state_dict(packed, state)
    assert torch.equal(packed(x), expected)
    with disable_adapter(packed):
        assert torch.equal(packed(x), before)

    receiver = IncrementReceiver(plain_packed)
    refused = {
        r"2\.weight is \(128, 64\) in the package and quantized \(torch\.uint8\) in the model": (
            plain_packed,
            lambda: receiver.receive(package),
        ),
        r"2\.weight is packed \(nf4\): an update cannot be merged into it": (packed, lambda: merge_adapter(packed)),
        r"2\.weight is packed \(nf4\): an update cannot be merged": (packed, lambda: merge_and_unload(packed)),
    }
    for message, (model, merge) in refused.items():
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            merge()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert receiver.version == -1 and torch.equal(packed(x), expected)


def test_another_scaling_is_refused() -> None:
    sender, receiver = trainer(), AdapterReceiver(trainer(), base="b")
    for linear in (sender[0], sender[2]):
        linear.lora_config = LoRAConfig(rank=3, alpha=9.0)
    with pytest.raises(ValueError, match="linears or scalings are not this model's: 0, 2"):
        receiver.receive(pack(sender, version=0, base="b"))


def test_any_flipped_byte_is_noticed() -> None:
    data = pack(trainer(), version=0, base="b")
    rng = random.Random(0)
    for place in [*range(300), *rng.sample(range(len(data)), 300)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        with pytest.raises(ValueError):
            unpack(bytes(flipped))


def test_fingerprints_tell_bases_apart_and_not_precisions_or_adapters() -> None:
    base = base_fingerprint(plain())
    assert base == base_fingerprint(plain().bfloat16()) == base_fingerprint(trainer())
    changed = plain()
    changed[2].weight.data[0, 0] *= 1.01
    renamed = nn.Sequential(nn.Identity(), *plain())
    assert len({base, base_fingerprint(changed), base_fingerprint(renamed)}) == 3


def test_a_file_is_replaced_at_once_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_file(tmp_path / "adapter", b"first")
    write_file(tmp_path / "adapter", b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("adapter", b"second")]


def test_a_package_of_8b_shapes_is_the_adapters_bytes_and_a_tenth_at_most() -> None:
    """On meta but for the adapters: rank 16 on all linears, 42M parameters."""
    with torch.device("meta"):
        model = Transformer(llama3_args["8B"])
    linears = apply_lora(model, LoRAConfig(rank=16))
    for linear in linears:
        linear.lora_a.to_empty(device="cpu")
        linear.lora_b.to_empty(device="cpu")
    size = sum(param.numel() * 2 for param in adapter_parameters(model).values())
    data = pack(model, version=0, base="b", dtype=torch.bfloat16)
    assert len(linears) == 224 and size > 80e6
    assert size < len(data) < 1.001 * size
