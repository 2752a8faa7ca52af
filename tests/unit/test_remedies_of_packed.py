"""What the messages about packed weights say to do, until the trouble is gone."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hf_models import tiny_llama
from transformers import AutoModelForCausalLM

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, merge_adapter, merge_and_unload
from lora_converter.cli import main
from lora_converter.packed_linear import pack_linear
from lora_converter.peft import from_model, save_peft


def with_adapters(model: nn.Module) -> nn.Module:
    apply_lora(model, LoRAConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    for param in adapter_parameters(model).values():
        param.data.normal_(std=0.1, generator=generator)
    return model


def test_what_cannot_be_merged_into_packed_weights_is_merged_into_the_original_base(tmp_path: Path) -> None:
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "base")
    packed = copy.deepcopy(dense)
    for name, module in list(packed.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            pack_linear(module, form="nf4", fqn=name)
    with_adapters(packed)
    says = (
        r"q_proj\.weight is packed \(nf4\): an update cannot be merged into it\. "
        r"Merge into the original base with `lora-converter merge`\."
    )
    with pytest.raises(ValueError, match=says):
        merge_adapter(packed)

    save_peft(from_model(packed), str(tmp_path / "adapter"))
    folders = {name: str(tmp_path / name) for name in ("base", "adapter", "merged")}
    assert (
        main(["merge", "--base", folders["base"], "--adapter", folders["adapter"], "--output", folders["merged"]]) == 0
    )
    merge_and_unload(with_adapters(dense))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)  # one product, in another order


def test_a_dense_weight_is_loaded_before_it_is_packed() -> None:
    dense, packed = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(64, 32))
    pack_linear(packed[0], form="nf4", fqn="0")
    with_adapters(packed)
    before = packed[0].weight.clone()
    says = (
        r"0\.weight is packed \(nf4\), and a tensor of shape \(32, 64\) is not\. "
        r"Load a dense weight before pack_linear packs it\."
    )
    with pytest.raises(RuntimeError, match=says):
        packed.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(packed[0].weight, before)

    fresh = nn.Sequential(nn.Linear(64, 32))
    fresh.load_state_dict(dense.state_dict())
    pack_linear(fresh[0], form="nf4", fqn="0")
    packed.load_state_dict(fresh.state_dict(), strict=False)
    assert not torch.equal(packed[0].weight, before) and torch.equal(packed[0].weight, fresh[0].weight)
