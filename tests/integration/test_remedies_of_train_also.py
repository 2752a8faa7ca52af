"""What messages about `lora.train_also` ask for, done until the trouble is gone."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import build, train
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.experts import experts_of
from lora_converter.titan.experts import EXPERT_CLASSES


def refused(folder: Path, *options: str) -> str:
    with pytest.raises(ValueError) as error:
        build(folder, *options)
    return str(error.value)


@pytest.fixture
def on(hf_base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf", "--training.steps=1"]


def test_a_name_that_matches_nothing_is_replaced_by_one_of_the_list(on: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *on, "--lora.train_also=embeddings")
    assert "matches no module of the model; those with weights of their own are tok_embeddings, " in message
    assert "tok_embeddings.weight" in adapter_parameters(
        train(tmp_path, *on, "--lora.train_also=tok_embeddings").trainer.model_parts[0]
    )


def test_a_module_that_has_an_adapter_is_taken_out_of_one_of_the_two(on: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *on, "--lora.train_also=layers.0.attention.wq,norm")
    assert "has an adapter. Add layers.0.attention.wq to lora.exclude_modules, or leave layers.0." in message
    assert "attention.wq out of lora.train_also." in message
    for mended in (["wq,norm", "--lora.exclude_modules=wq"], ["norm"]):
        run = train(tmp_path / str(len(mended)), *on, f"--lora.train_also={mended[0]}", *mended[1:])
        assert "norm.weight" in adapter_parameters(run.trainer.model_parts[0])


def test_what_trains_is_fp32_and_the_rest_may_be_less(on: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *on, "--lora.train_also=norm", "--training.dtype=bfloat16")
    assert "lora.train_also with training.dtype = 'bfloat16'" in message
    assert 'Set training.dtype = "float32"; frozen weights are stored in' in message
    run = train(tmp_path, *on, "--lora.train_also=norm", "--training.mixed_precision_param=bfloat16")
    dtypes = {param.requires_grad: param.dtype for param in run.trainer.model_parts[0].layers["0"].parameters()}
    assert dtypes[True] is torch.float32


def test_routed_experts_are_named_as_targets() -> None:
    import tiny_models  # noqa: F401  the flavor

    spec = get_train_spec("qwen3")
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args["tiny_moe"])
    assert experts_of(model, EXPERT_CLASSES)
    with pytest.raises(ValueError, match=r"train by adapters alone\. Name them in lora\.target_modules\."):
        apply_lora(model, LoRAConfig(train_also=["layers.*.moe.experts"]), expert_classes=EXPERT_CLASSES)
    apply_lora(model, LoRAConfig(target_modules=["experts"], train_also=["norm"]), expert_classes=EXPERT_CLASSES)
    assert "norm.weight" in adapter_parameters(model)


def test_what_is_quantized_is_left_out() -> None:
    def model() -> nn.ModuleDict:
        plain = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "v": nn.Linear(4, 4)})
        plain["v"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        return plain

    with pytest.raises(ValueError, match=r"v is quantized or packed, .* Leave it out of lora\.train_also\."):
        apply_lora(model(), LoRAConfig(target_modules=["q"], train_also=["v", "norm"]))
    mended = model()
    apply_lora(mended, LoRAConfig(target_modules=["q"], train_also=["norm"]))
    assert {"norm.weight", "norm.bias"} < adapter_parameters(mended).keys()
