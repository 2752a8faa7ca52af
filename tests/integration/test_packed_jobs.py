"""What else a job does, on a packed base: as the same job on the base that bitsandbytes dequantises."""

import shutil
from pathlib import Path

import pytest
import torch
from chat_job import chat_options
from harness import Run, adapter_state, build, finish, parse, train
from parity import FULL_AC
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_head import VALIDATION, validated
from test_packed_base import NF4, fingerprint, formats_of, linears_of, on, same_runs, save_wide_base, through_nf4
from transformers import AutoModelForCausalLM

from lora_converter.peft import load_peft

PEFT = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=float32")
SHORT = "--training.steps=2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_base(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def dense(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as bitsandbytes dequantises it, for transformers too."""
    folder = tmp_path_factory.mktemp("dense") / "base"
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    weights |= {n: through_nf4(w.bfloat16())[1] for n, w in linears_of(weights).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plain(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("plain"), *on(dense, SHORT))


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run whose adapters do something, and the PEFT directory at its end."""
    folder = tmp_path_factory.mktemp("exported")
    run = train(folder, *on(base, NF4, *PEFT, SHORT, "--lora.alpha=64", "--optimizer.lr=2e-2"))
    return run, folder / "checkpoint/step-2"


def test_the_losses_of_validation_are_those_of_the_dense_run(base: Path, dense: Path, tmp_path: Path) -> None:
    options = (SHORT, *VALIDATION, f"--validation.dataset_path={parse(tmp_path).training.dataset_path}")
    packed, other = (
        build(tmp_path / "packed", *on(base, *options, NF4)),
        build(tmp_path / "dense", *on(dense, *options)),
    )
    found = validated(packed)
    assert found == pytest.approx(validated(other), rel=1e-6) and len(set(found)) == 2
    same_runs(packed, other)


@pytest.mark.parametrize("options", [["--lora.dropout=0.5"], FULL_AC], ids=["dropout", "full AC"])
def test_it_trains_as_the_dense_run(base: Path, dense: Path, plain: Run, tmp_path: Path, options: list[str]) -> None:
    packed = train(tmp_path / "packed", *on(base, NF4, SHORT, *options))
    same_runs(packed, train(tmp_path / "dense", *on(dense, SHORT, *options)))
    assert (packed.losses == pytest.approx(plain.losses, rel=1e-6)) == (options == FULL_AC)


def test_transformers_and_peft_give_its_logits_on_the_dense_base(exported: tuple[Run, Path], dense: Path) -> None:
    run, path = exported
    tokens = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(dense).eval()
    with torch.no_grad():
        untouched = theirs(input_ids=tokens).logits
        found = PeftModel.from_pretrained(theirs, path).eval()(input_ids=tokens).logits
        expected = run.trainer.model_parts[0].eval()(tokens)
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32, with another attention kernel
    packed = load_peft(path).packed
    assert packed is not None and packed.form == "nf4"
    assert sorted(packed.names()) == sorted(linears_of(load_file(dense / "model.safetensors")))


def test_another_packed_run_starts_from_what_was_exported(
    exported: tuple[Run, Path], base: Path, tmp_path: Path
) -> None:
    run, path = exported
    following = build(tmp_path, *on(base, NF4, f"--lora.initial_adapter_path={path}", "--training.steps=1"))
    following.trainer.checkpointer.load()
    theirs = adapter_state(run)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter_state(following).items())
    assert fingerprint(following) == fingerprint(run)
    finish(following)
    assert following.losses[0] < run.losses[0] and formats_of(following) == {"nf4"}


def test_a_job_on_conversations_is_that_of_the_dense_run(base: Path, dense: Path, chat: Path, tmp_path: Path) -> None:
    options = ["--chat.packing=none", "--training.steps=1", "--training.local_batch_size=2"]
    packed, other = (
        train(tmp_path / name, *on(folder, *chat_options(chat), *options, *form))
        for name, folder, form in (("packed", base, [NF4]), ("dense", dense, []))
    )
    same_runs(packed, other)
    assert formats_of(packed) == {"nf4"} and packed.trainer.job_config.training.dataset == "chat"
