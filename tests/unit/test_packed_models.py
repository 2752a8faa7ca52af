"""Whole models with packed weights are counted, and checkpointed, by their weights and not by their bytes."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from harness import TINY, install
from memory import Made, kept_by_selective_checkpointing
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.config.job_config import ActivationCheckpoint, JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter import LoRAConfig, apply_lora, fingerprint
from lora_converter import packed as packed_room
from lora_converter.adapters import count_parameters
from lora_converter.dcp import twins
from lora_converter.dcp.states import ModelSubset
from lora_converter.dcp.twins import Twins
from lora_converter.experts import expert_shapes, experts_of, pack_experts
from lora_converter.hf.base import HuggingFaceBase
from lora_converter.linear import linear_shapes, linears_of
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_linear import pack_linear
from lora_converter.packed_module import packed_weights
from lora_converter.packing import pack_model, packable
from lora_converter.titan.experts import EXPERT_CLASSES
from lora_converter.titan.models import built_on_meta
from lora_converter.titans.flops import flops_not_spent


def pack(model: nn.Module) -> nn.Module:
    """All linears of its layers that blocks fill, and all routed experts."""
    for fqn, linear in linears_of(model).items():
        if fqn.startswith("layers.") and FORMATS["nf4"].fits(linear.in_features) and "router" not in fqn:
            pack_linear(linear, form="nf4", fqn=fqn)
    for fqn, (experts, kind) in experts_of(model, EXPERT_CLASSES).items():
        pack_experts(experts, kind, form="mxfp4", fqn=fqn)
    return model


def flops(model: Any) -> int:
    """Per token, as the trainer has them."""
    count = model.model_args.get_nparams_and_flops
    return count(model, 2048)[1] - flops_not_spent(model, 2048, count)


@pytest.mark.parametrize(
    ("name", "flavor"),
    [("llama3", "debugmodel"), ("qwen3", "debugmodel_moe"), ("deepseek_v3", "debugmodel"), ("gpt_oss", "debugmodel")],
)
def test_they_are_counted_as_the_models_of_the_unpacked_weights(name: str, flavor: str) -> None:
    spec = get_train_spec(name)
    dense = built_on_meta(spec, spec.model_args[flavor], JobConfig())
    packed = pack(copy.deepcopy(dense))
    names = {n for n, param in packed.named_parameters() if param.dtype is torch.uint8}
    assert len(names) == len([*packed_weights(packed)]) > 10
    assert any("experts" in n for n in names) == (name != "llama3")
    assert expert_shapes(packed) == expert_shapes(dense, EXPERT_CLASSES)
    before = {n: param.shape for n, param in packed.named_parameters()}
    for model in (dense, packed):
        targets = ["all-linear", *(["experts"] if name != "llama3" else [])]
        apply_lora(model, LoRAConfig(rank=4, target_modules=targets), expert_classes=EXPERT_CLASSES)
    assert count_parameters(packed) == count_parameters(dense) and linear_shapes(packed) == linear_shapes(dense)
    assert flops(packed) == flops(dense)
    assert {n: param.shape for n, param in packed.named_parameters() if n in before} == before


def kept(model: nn.Module) -> Counter[tuple[int, ...]]:
    """Shapes that selective activation checkpointing keeps of one forward, rows together."""
    values = kept_by_selective_checkpointing(lambda: model(torch.zeros(2, 16, dtype=torch.int64)))
    return Counter(tuple(v.flatten(0, -2).shape) for v in values if v.numel())


def test_products_that_are_named_are_recomputed_as_the_dense_ones_are() -> None:
    install()
    torch.manual_seed(0)
    with torch.device("meta"):
        made = Transformer(TransformerModelArgs(**TINY))
    made.requires_grad_(False).to_empty(device="cpu").init_weights()
    found = {}
    for fqns in ([], ["attention.wk", "feed_forward.w1"]):
        settings = ActivationCheckpoint(
            mode="selective", selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=fqns
        )
        for which in ("dense", "packed"):
            model = copy.deepcopy(made) if which == "dense" else pack(copy.deepcopy(made))
            model.requires_grad_(False).tok_embeddings.requires_grad_()
            apply_ac(model, settings, op_sac_save_list=_op_sac_save_list)
            found[which, bool(fqns)] = kept(model)
        assert found["packed", bool(fqns)] == found["dense", bool(fqns)]
    assert found["dense", True] != found["dense", False]
    assert all(p.dtype is torch.uint8 for n, p in model.named_parameters() if n.endswith("wk.weight"))


def test_the_twins_of_one_part_are_gone_before_the_next_are_made() -> None:
    """Also while whoever reads still holds the part."""
    model = nn.Sequential(*(nn.Linear(256, 128, bias=False) for _ in range(4)))
    packed = pack_model(model, dict.fromkeys(packable(model), "nf4")).packed
    read = Twins(ModelSubset([model], lambda name: True), packed)
    largest = 2 * 128 * 256
    with (
        mock.patch.object(twins, "_AT_A_TIME", largest),
        mock.patch.object(packed_room, "_CHUNK", 2**10),
        mock.patch.dict(fingerprint._ELEMENTS_AT_A_TIME, cpu=2**10),
        Made(*model.parameters()) as made,
    ):
        held = [part for part in read.parts() if all(value.zero_() is value for value in part.values())]
    assert len(held) == 4 and largest < made.peak < 1.5 * largest


class Fused:
    """A host's adapter whose Hugging Face model has q, k and v in one weight."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        layers = sorted({name.partition(".")[0] for name in state_dict})
        return {f"{i}.qkv": torch.cat([state_dict[f"{i}.attention.w{x}.weight"] for x in "qkv"]) for i in layers}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {f"none of its weights by {name}": value for name, value in hf_state_dict.items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(path)


def test_what_a_folder_stores_together_is_packed_a_few_modules_at_a_time(tmp_path: Path) -> None:
    sizes = {"wq": 128, "wk": 64, "wv": 32}
    attentions = [nn.ModuleDict({name: nn.Linear(64, n, bias=False) for name, n in sizes.items()}) for _ in range(2)]
    model = nn.ModuleDict({str(i): nn.ModuleDict({"attention": own}) for i, own in enumerate(attentions)})
    save_file(Fused().to_hf(model.state_dict()), tmp_path / "model.safetensors")
    expected = {name: FORMATS["nf4"].pack(weight) for name, weight in model.state_dict().items()}
    packed = pack_model(model, dict.fromkeys(packable(model), "nf4")).packed
    for param in model.parameters():
        param.zero_()
    read = Twins(ModelSubset([model], lambda name: True), packed)
    base = HuggingFaceBase(Fused(), str(tmp_path), read, quantized=False)
    with mock.patch.object(twins, "_AT_A_TIME", 2 * 128 * 64):
        base.check()
        base.load()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
