"""Quantization-aware training by a converter of the user's, with adapters: torchtitan's trainer, one rank."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import BASE_CONFIG, adapter_state, build, finish, full_state, parse, train
from hf_tiny import tiny_llama
from peft import PeftModel
from qat_converter import IMPORT, INPUTS_TOO, WEIGHTS_ALONE, Int4Weights, Int8InputsInt4Weights
from test_checkpoint import failing
from torch.distributed.checkpoint import FileSystemReader
from torchao.quantization.qat import FakeQuantizedLinear
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.protocols.model_converter import _registry_model_converter_cls

from lora_converter.adapted import adapted_modules
from lora_converter.titan.converter import LoRAConverter

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def test_a_job_on_fake_quantized_linears_is_saved_resumed_and_exported(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), *INPUTS_TOO, "--lora.alpha=64", "--optimizer.lr=2e-2", "--checkpoint.interval=2"]
    options += ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    run = build(tmp_path / "run", *options)
    model = run.trainer.model_parts[0]
    adapted = list(adapted_modules(model))
    assert len(adapted) == 28 and all(isinstance(linear, FakeQuantizedLinear) for linear in adapted)
    run.trainer.checkpointer.load()
    before, adapters = full_state(run), set(adapter_state(run))
    finish(run)
    after = full_state(run)
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapters

    # New adapters change nothing: the first loss is that of the user's converter alone.
    alone = [*on(hf_base), IMPORT, "--model.converters=my_int8_int4", "--training.steps=1"]
    assert train(tmp_path / "alone", *alone, config=BASE_CONFIG).losses == run.losses[:1]

    saved = FileSystemReader(tmp_path / "run/checkpoint/step-2").read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("layers.")} == adapters
    assert not {"tok_embeddings.weight", "output.weight", "norm.weight"} & saved.keys()
    again = train(tmp_path / "run", *options, "--checkpoint.load_step=2")
    assert again.losses == run.losses[2:]

    # PEFT on torchao's linears in transformers' model.
    theirs = tiny_llama().eval()
    Int8InputsInt4Weights(None, None).convert(theirs)
    with torch.no_grad():
        base, expected = theirs(input_ids=TOKENS).logits, model(TOKENS)
        found = PeftModel.from_pretrained(theirs, tmp_path / "run/checkpoint/step-3").eval()(input_ids=TOKENS).logits
    assert (base - expected).norm() > 0.1 * expected.norm()
    # fp32 with another attention kernel, whose last bits make some inputs another int8.
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("way", ["resume", "start from"])
def test_adapters_go_on_under_the_converters_of_their_training(
    way: str, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(tmp_path / "run", *on(hf_base), *WEIGHTS_ALONE, "--training.steps=1")
    step, folder, start = tmp_path / "run/checkpoint/step-1", tmp_path / "run", ["--training.steps=2"]
    if way == "start from":
        folder, start = tmp_path / "next", [f"--lora.initial_adapter_path={step}"]

    def takes(*options: str) -> bool:
        run = build(folder, *on(hf_base), *start, *options)
        run.trainer.checkpointer.load()
        run.trainer.close()
        theirs = adapter_state(first)
        return all(torch.equal(value, theirs[name]) for name, value in adapter_state(run).items())

    for here, options in ((["my_int8_int4"], INPUTS_TOO), ([], ())):
        _, message = failing(folder, *on(hf_base), *start, *options)
        both = f"Beside \"lora\" {step} was trained with model.converters ['my_int4']; here they are {here}."
        assert message == (f"{both} Set model.converters as they were there, or set lora.accept_other_base = true.")
    assert takes(*WEIGHTS_ALONE) and "lora.accept_other_base is set" not in caplog.text
    assert takes("--lora.accept_other_base")
    assert f"{both} lora.accept_other_base is set, so it is used all the same." in caplog.text
    described = json.loads((step / "lora.json").read_text())
    assert described.pop("converters") == ["my_int4"]
    (step / "lora.json").write_text(json.dumps(described))  # as older versions wrote it
    assert takes()


def test_a_converter_that_takes_adapters_off_is_found(
    hf_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [*on(hf_base), IMPORT, "--model.converters=lora,my_int4"]
    says = (
        '28 modules have lost their adapters to a converter that stands after "lora" in model.converters, '
        'layers.0.attention.wq among them. Put "lora" last.'
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        build(tmp_path / "late", *late)
    run = build(tmp_path / "last", *on(hf_base), *WEIGHTS_ALONE)
    run.trainer.close()

    # One that says what it is, is refused before it converts anything.
    known = type("Known", (Int4Weights, QuantizationConverter), {})
    monkeypatch.setitem(_registry_model_converter_cls, "my_int4", known)
    with pytest.raises(ValueError, match=r"my_int4 stands after \"lora\" and would quantize the adapters\. Write "):
        build(tmp_path / "refused", *late)


def test_linears_that_tensor_parallelism_cannot_shard_are_refused(tmp_path: Path) -> None:
    """torchao's alone fail with an AttributeError of torch's."""
    config = parse(tmp_path, "--checkpoint.initial_load_path=", *WEIGHTS_ALONE)
    with torch.device("meta"):
        plain = Transformer(llama3_args["tiny"])
    quantized = copy.deepcopy(plain)
    Int4Weights(None, None).convert(quantized)

    def convert(model: nn.Module, tp: int) -> None:
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=tp, pp=1, ep=1, etp=1, world_size=tp)
        LoRAConverter(config, dims).convert(model)

    says = (
        "llama3/tiny: parallelism.tensor_parallel_degree: torch cannot shard 28 linears that a converter has given "
        "modules of their own, layers.0.attention.wq (FakeQuantizedLinear) among them. Leave out tensor parallelism or "
        "that converter."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        convert(quantized, tp=2)
    assert type(quantized.layers["0"].attention.wq) is FakeQuantizedLinear
    convert(plain, tp=2)
    convert(quantized, tp=1)
