"""What the messages about `lora.base_format` say to do is done, and the job goes on. One rank."""

import functools
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from harness import BASE_CONFIG, adapter_state, build, finish, train
from qat_converter import IMPORT, WEIGHTS_ALONE
from safetensors.torch import load_file
from test_checkpoint import failing
from test_packed_base import AS_RELEASED, NF4, formats_of, linears_of, on, save, save_wide_base, through_nf4
from tiny_models import WIDE

STEP = "--training.steps=1"
RANDOM = (*WIDE, "--checkpoint.initial_load_path=")
PEFT = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_base(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def dcp(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a job on the same base as a DCP folder."""
    folder = tmp_path_factory.mktemp("dcp")
    train(folder, *on(base, STEP, "--optimizer.lr=0"), config=BASE_CONFIG)
    return (*WIDE, f"--checkpoint.initial_load_path={folder}/checkpoint/step-1")


def refused(folder: Path, *options: str) -> str:
    """The message of a job that is refused before anything is loaded."""
    with pytest.raises(ValueError) as error:
        build(folder, *options)
    return str(error.value)


@functools.cache  # several messages ask for the same job
def trains(*options: str) -> set[str]:
    """That a job does one step. Returns the formats of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(folder, *options, STEP)
    assert len(run.losses) == 1 and math.isfinite(run.losses[0])
    return formats_of(run)


def test_a_random_base_gives_way_to_a_pretrained_one_or_stays_dense(base: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, *RANDOM, NF4) == (
        "lora.base_format = 'nf4': a random base cannot be packed, since every checkpoint would have to store it. "
        "Set checkpoint.initial_load_path to a pretrained base, or leave base_format out."
    )
    assert trains(*on(base, NF4)) == {"nf4"}
    assert trains(*RANDOM) == set()


def test_a_base_that_would_not_be_loaded_is(base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *RANDOM, NF4, "--checkpoint.no-enable")
    with pytest.raises(ValueError) as error:
        finish(run)
    run.trainer.close()
    assert str(error.value) == (
        "lora.base_format = 'nf4', but nothing is loaded with checkpoint.enable = false. Set it to true, and "
        "checkpoint.initial_load_path to a pretrained base."
    )
    assert trains(*on(base, NF4, "--checkpoint.enable")) == {"nf4"}


def test_a_full_phase_is_a_job_of_its_own_whose_result_is_packed(
    base: Path, dcp: tuple[str, ...], tmp_path: Path
) -> None:
    assert refused(tmp_path, *on(base, NF4, "--lora.full_phase.steps=2")) == (
        "lora.base_format = 'nf4' with lora.full_phase.steps = 2: it trains every weight, and packed ones cannot. "
        "Train the phase as a job of its own, and set its result as the base of this one."
    )
    assert trains(*dcp, NF4) == {"nf4"}  # of a job without "lora"


def test_one_of_two_that_say_how_weights_are_stored_is_left_out(base: Path, tmp_path: Path) -> None:
    float8 = ("--model.converters=quantize.linear.float8,lora", "--quantize.linear.float8.emulate")
    assert refused(tmp_path, *on(base, NF4, *float8)) == (
        "lora.base_format = 'nf4' with quantize.linear.float8 in model.converters: both say how frozen weights are "
        "stored. Leave out one of them."
    )
    assert trains(*on(base, NF4)) == {"nf4"}
    assert trains(*on(base, *float8)) == set()


def test_linears_with_a_product_of_their_own_are_not_packed(base: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, *on(base, NF4, *WEIGHTS_ALONE)) == (
        "llama3/tiny_wide: layers.0.attention.wq cannot be packed: its class, FakeQuantizedLinear, has a product of "
        "its own. Leave out lora.base_format, or the converter that made it."
    )
    assert trains(*on(base, *WEIGHTS_ALONE)) == set()
    assert trains(*on(base, NF4, IMPORT)) == {"nf4"}


def test_as_released_means_the_folder_of_hugging_face(base: Path, dcp: tuple[str, ...], tmp_path: Path) -> None:
    assert re.fullmatch(
        r"lora\.base_format = 'as-released' keeps the format of a Hugging Face folder, and .*/step-1 is read as a DCP "
        r"folder\. Set checkpoint\.initial_load_in_hf = true, or base_format = \"nf4\"\.",
        refused(tmp_path, *dcp, AS_RELEASED),
    )
    assert trains(*dcp, NF4) == {"nf4"}
    weights = load_file(base / "model.safetensors")
    for name, weight in linears_of(weights).items():
        weights |= {f"{name}{part}": value for part, value in through_nf4(weight.bfloat16())[0].items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert trains(*on(save(tmp_path / "stored", weights, config), AS_RELEASED)) == {"nf4"}


def test_as_released_means_a_folder_that_is_packed(base: Path, tmp_path: Path) -> None:
    says = (
        f"llama3/tiny_wide: lora.base_format = 'as-released': {base} has no weights that are packed in a way that can "
        'be kept (bitsandbytes NF4, MXFP4, fp8 in blocks). Set it to "nf4" to pack them, or leave it out.'
    )
    assert refused(tmp_path, *on(base, AS_RELEASED)) == says
    assert trains(*on(base, NF4)) == {"nf4"}
    assert trains(*on(base)) == set()


def test_as_released_means_that_there_is_a_folder(base: Path, tmp_path: Path) -> None:
    nothing = (*RANDOM, "--checkpoint.no-enable")
    assert refused(tmp_path, *nothing, AS_RELEASED) == (
        "llama3/tiny_wide: lora.base_format = 'as-released' depends on the folder of the base, and none is read here, "
        'as in every plan. Set "nf4", or in a job checkpoint.enable = true and checkpoint.initial_load_path.'
    )
    assert trains(*on(base, NF4, "--checkpoint.enable")) == {"nf4"}


def test_an_unknown_format_gives_way_to_one_of_those_that_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        build(tmp_path, *on(base, "--lora.base_format=int4"))
    assert "lora.base_format = 'int4': must be one of '', 'nf4'," in capsys.readouterr().err
    assert trains(*on(base, NF4)) == {"nf4"}


@pytest.mark.parametrize(
    ("way", "trained", "other"),
    [("resume", (NF4,), ()), ("a step", (), (NF4,)), ("a PEFT directory", (NF4,), ())],
)
def test_adapters_go_on_with_their_own_format(
    base: Path, tmp_path: Path, way: str, trained: tuple[str, ...], other: tuple[str, ...], caplog
) -> None:
    first = train(tmp_path / "run", *on(base, STEP, *trained, *(PEFT if way == "a PEFT directory" else ())))
    step, folder, start = tmp_path / "run/checkpoint/step-1", tmp_path / "run", ["--lr_scheduler.total_steps=2"]
    if way != "resume":
        folder, start = tmp_path / "next", [*start, f"--lora.initial_adapter_path={step}"]
    start += ["--training.steps=2"]
    words = {(NF4,): "packed as nf4", (): "not packed"}
    both = f"{step} was trained on a base that was {words[trained]}; the base here is {words[other]}."
    _, message = failing(folder, *on(base, *start, *other))
    assert (
        message == f"{both} Set lora.base_format and the base as they were there, or set lora.accept_other_base = true."
    )
    for options in ((*other, "--lora.accept_other_base"), trained):
        run = build(folder, *on(base, *start, *options))
        run.trainer.checkpointer.load()
        theirs = adapter_state(first)
        assert all(torch.equal(value, theirs[name]) for name, value in adapter_state(run).items())
        if options == trained:
            finish(run)
            assert math.isfinite(run.losses[-1])
        else:
            run.trainer.close()
    assert f"{both} lora.accept_other_base is set, so it is used all the same." in caplog.text
