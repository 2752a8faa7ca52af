"""What the messages about packed weights say to do, until the trouble is gone."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hf_tiny import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, merge_adapter, merge_and_unload
from lora_converter.cli import main
from lora_converter.hf.packed_base import PackedBase
from lora_converter.merge import merge_directories
from lora_converter.packed_linear import pack_linear
from lora_converter.peft import from_model, load_peft, save_peft


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


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """base/, and adapter/, which records that its training had all linears but the head in nf4."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            pack_linear(module, form="nf4", fqn=name)
    save_peft(from_model(with_adapters(model)), str(tmp_path / "adapter"))
    packed = load_peft(tmp_path / "adapter").packed
    assert packed is not None and packed.form == "nf4" and len(packed.weights) == 7 and len(packed.names()) == 28
    return tmp_path


def merge(folder: Path, base: str = "base", adapter: str = "adapter", base_as: str = "nf4") -> int:
    return merge_directories(folder / base, folder / adapter, folder / "merged", base_as=base_as)


def quantized_in_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def quantized_in_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    absmax = {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(8)}
    save_file({**load_file(path), **absmax}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("quantize", [quantized_in_name, quantized_in_tensors])
def test_a_quantized_base_is_not_packed_once_more_but_its_original_is(quantize, trained: Path) -> None:
    shutil.copytree(trained / "base", trained / "quantized")
    quantize(trained / "quantized")
    says = r"--base-as nf4: .*quantized holds quantized weights itself\. Merge into the unquantized original"
    with pytest.raises(ValueError, match=says):
        merge(trained, "quantized")
    assert not (trained / "merged").exists()
    assert merge(trained) == 28


def test_another_format_than_that_of_the_training_is_refused_and_left_out(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"--base-as int4 is not known\. It may be nf4, or be left out\."):
        merge(trained, base_as="int4")
    packed = PackedBase.of("mxfp4", ["model.layers.0.mlp.up_proj.weight"])
    save_peft(replace(load_peft(trained / "adapter"), packed=packed), str(trained / "other"))
    says = r"--base-as nf4: the adapter was trained on mxfp4 weights, .*Leave --base-as out, and merge into an unquant"
    with pytest.raises(ValueError, match=says):
        merge(trained, adapter="other")
    assert merge(trained, adapter="other", base_as="") == 28


def test_a_base_without_the_weights_that_were_packed_gives_way_to_that_of_the_training(trained: Path) -> None:
    shutil.copytree(trained / "base", trained / "smaller")
    path = trained / "smaller" / "model.safetensors"
    left = {key: value for key, value in load_file(path).items() if "layers.1.self_attn.o_proj" not in key}
    save_file(left, path, metadata={"format": "pt"})
    adapter = load_peft(trained / "adapter")
    factors = {name: pair for name, pair in adapter.factors.items() if "q_proj" in name}
    save_peft(replace(adapter, factors=factors), str(trained / "of queries"))
    says = (
        r"The training had model\.layers\.1\.self_attn\.o_proj\.weight packed, which are not in the base\. "
        r"Name the base of its training\."
    )
    with pytest.raises(ValueError, match=says):
        merge(trained, "smaller", "of queries")
    assert merge(trained, "base", "of queries") == 4
