"""What a step checkpoint holds, and that a resumed run is the run that was not interrupted. One rank."""

import os
from pathlib import Path

import pytest
import torch
from harness import Run, adapter_state, build, finish, full_state, train
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lora_converter import count_parameters

DETERMINISTIC = "--debug.deterministic"
RANDOM_BASE = "--checkpoint.initial_load_path="


def source(kind: str, hf_base: Path, dcp_base: Path) -> list[str]:
    return {
        "hf": [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf"],
        "dcp": [f"--checkpoint.initial_load_path={dcp_base}"],
        "random": [RANDOM_BASE],
    }[kind]


def steps(folder: Path) -> set[str]:
    return set(os.listdir(folder / "checkpoint"))


def stored(folder: Path, step: int) -> dict[str, object]:
    return FileSystemReader(str(folder / "checkpoint" / f"step-{step}")).read_metadata().state_dict_metadata


def size(folder: Path, step: int) -> int:
    return sum(file.stat().st_size for file in (folder / "checkpoint" / f"step-{step}").iterdir())


@pytest.fixture(autouse=True)
def _deterministic_algorithms_off_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("base", ["hf", "dcp", "random"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    base: str, mode: str, hf_base: Path, dcp_base: Path, tmp_path: Path
) -> None:
    options = [*source(base, hf_base, dcp_base), DETERMINISTIC, f"--checkpoint.async_mode={mode}"]
    options += ["--checkpoint.interval=3", "--lora.dropout=0.1", "--lr_scheduler.total_steps=6"]
    whole = train(tmp_path / "whole", *options, "--training.steps=6")
    first = train(tmp_path / "parts", *options, "--training.steps=3")
    second = build(tmp_path / "parts", *options, "--training.steps=6")
    torch.rand(7)  # the resumed process has another history
    finish(second)
    assert first.losses + second.losses == whole.losses
    expected, resumed = full_state(whole), full_state(second)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_step_holds_what_was_trained_and_no_base_weight(hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *source("hf", hf_base, dcp_base))
    names = stored(tmp_path, 3)
    tensors = {name for name, entry in names.items() if isinstance(entry, TensorStorageMetadata)}
    adapters = set(adapter_state(run))
    assert {name for name in tensors if not name.startswith("optimizer.")} == adapters
    assert tensors - adapters == {
        f"optimizer.state.{name}.{key}" for name in adapters for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {name.split(".")[0] for name in set(names) - tensors} == {
        "optimizer",
        "lr_scheduler",
        "dataloader",
        "train_state",
    }


@pytest.mark.parametrize("rank", [4, 64])
def test_a_step_takes_at_most_13_bytes_per_trained_parameter_and_a_mebibyte(
    rank: int, hf_base: Path, dcp_base: Path, tmp_path: Path
) -> None:
    run = train(tmp_path, *source("dcp", hf_base, dcp_base), f"--lora.rank={rank}", "--training.steps=1")
    trained = count_parameters(run.trainer.model_parts[0]).trainable
    assert 12 * trained < size(tmp_path, 1) <= 13 * trained + 2**20


def test_a_random_base_is_stored_and_comes_back(tmp_path: Path) -> None:
    first = train(tmp_path, RANDOM_BASE)
    second = build(tmp_path, RANDOM_BASE, "--debug.seed=99")  # another random base, were it not for the checkpoint
    second.trainer.checkpointer.load()
    trained, resumed = full_state(first), full_state(second)
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    second.trainer.close()


def test_keep_latest_k_keeps_the_newest_and_load_step_picks_one(hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    options = [*source("dcp", hf_base, dcp_base), "--checkpoint.interval=1"]
    whole = train(tmp_path, *options, "--training.steps=4", "--checkpoint.keep_latest_k=2")
    assert steps(tmp_path) == {"step-2", "step-3", "step-4"}  # torchtitan purges before the last save, not after
    again = train(tmp_path, *options, "--training.steps=4", "--checkpoint.load_step=2", "--checkpoint.load_only")
    assert again.losses == whole.losses[2:]


def test_exclude_from_loading_leaves_the_optimizer_fresh(hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    options = source("dcp", hf_base, dcp_base)
    train(tmp_path, *options)
    run = build(tmp_path, *options, "--checkpoint.exclude_from_loading=optimizer,lr_scheduler")
    run.trainer.checkpointer.load()
    assert run.trainer.step == 3 and run.trainer.lr_schedulers.schedulers[0].last_epoch == 0
    moments = [state["exp_avg"] for state in run.trainer.optimizers.optimizers[0].state.values()]
    assert not any(moment.any() for moment in moments)
    run.trainer.close()


@pytest.mark.parametrize("base", ["dcp", "random"])
def test_training_starts_from_a_seed_checkpoint(base: str, hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    options = source(base, hf_base, dcp_base)
    seed = build(tmp_path, *options, "--checkpoint.create_seed_checkpoint")
    seed.trainer.checkpointer.save(curr_step=0, last_step=True)
    planted = adapter_state(seed)
    seed.trainer.close()
    run = build(tmp_path, *options, "--debug.seed=99")
    run.trainer.checkpointer.load()
    assert run.trainer.step == 0
    grown = adapter_state(run)
    assert all(torch.equal(planted[name], grown[name]) for name in planted)
    if base == "random":
        seeded, loaded = full_state(seed), full_state(run)
        assert all(torch.equal(seeded[name], loaded[name]) for name in seeded)
    run.trainer.close()


def test_the_base_is_loaded_although_a_checkpoint_folder_without_a_step_exists(
    hf_base: Path, dcp_base: Path, tmp_path: Path
) -> None:
    """torchtitan alone would ignore initial_load_path and train on random weights."""
    (tmp_path / "checkpoint" / "step-1").mkdir(parents=True)  # a save that was killed: no .metadata
    options = source("dcp", hf_base, dcp_base)
    run = build(tmp_path, *options)
    assert run.trainer.checkpointer.load()
    clean = build(tmp_path / "clean", *options)
    clean.trainer.checkpointer.load()
    expected, found = full_state(clean), full_state(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    run.trainer.close()
    clean.trainer.close()


def test_a_model_without_adapters_keeps_torchtitans_checkpointer(dcp_base: Path) -> None:
    """The base of these tests was written by it, after the converter had been imported."""
    names = FileSystemReader(str(dcp_base)).read_metadata().state_dict_metadata
    assert "tok_embeddings.weight" in names and not any("lora" in name for name in names)


def failing(folder: Path, *options: str) -> tuple[Run, str]:
    """A run whose load is refused, and the message. Its model must be as it was."""
    run = build(folder, *options)
    before = full_state(run)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run.trainer.checkpointer.load(run.trainer.job_config.checkpoint.load_step)
    after = full_state(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.trainer.close()
    return run, str(error.value)


def test_every_key_of_a_base_that_does_not_fit_is_named_in_one_error(hf_base: Path, tmp_path: Path) -> None:
    from hf_tiny import save_tiny_llama
    from safetensors.torch import load_file, save_file

    wide = save_tiny_llama(tmp_path / "wide", hidden_size=128)
    file = wide / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    options = [f"--checkpoint.initial_load_path={wide}", "--checkpoint.initial_load_in_hf"]
    _, message = failing(tmp_path / "run", *options)
    assert message.startswith(
        f"The base in {wide} does not fit the model. 2 keys are missing: model.layers.2.mlp.up_proj.weight, "
        "lm_head.weight. 37 keys have another shape: model.embed_tokens.weight is (320, 128) there and (320, 64) in "
        "the model, "
    )
    assert message.count(" there and ") == 37 and message.endswith(" Check model.flavor and the folder.")


def test_a_hugging_face_folder_read_as_dcp_says_which_option_is_missing(hf_base: Path, tmp_path: Path) -> None:
    _, message = failing(tmp_path, f"--checkpoint.initial_load_path={hf_base}")
    assert message == (
        f"checkpoint.initial_load_path: {hf_base} is not a complete DCP checkpoint, it has no .metadata file. "
        "For a Hugging Face folder set checkpoint.initial_load_in_hf = true."
    )


def test_a_step_that_is_not_there_is_an_error(dcp_base: Path, tmp_path: Path) -> None:
    _, message = failing(tmp_path, f"--checkpoint.initial_load_path={dcp_base}", "--checkpoint.load_step=7")
    assert message == (
        f"checkpoint.load_step = 7: there is no {tmp_path}/checkpoint/step-7. Leave it at -1 for the newest step."
    )


def test_adapters_without_their_base_and_two_bases_are_refused(dcp_base: Path, tmp_path: Path) -> None:
    train(tmp_path / "sourced", f"--checkpoint.initial_load_path={dcp_base}")
    _, message = failing(tmp_path / "sourced", RANDOM_BASE)
    assert message == (
        f"{tmp_path}/sourced/checkpoint/step-3 holds adapters only. Set checkpoint.initial_load_path to the base they "
        "were trained on."
    )
    train(tmp_path / "random", RANDOM_BASE)
    _, message = failing(tmp_path / "random", f"--checkpoint.initial_load_path={dcp_base}")
    assert message == (
        f"{tmp_path}/random/checkpoint/step-3 stores a base of its own (its run had no checkpoint.initial_load_path), "
        f"but {dcp_base} is given as base. Resume without a base source, or use another job.dump_folder."
    )


def test_resuming_a_finished_run_explains_how_to_train_on(dcp_base: Path, tmp_path: Path) -> None:
    options = [f"--checkpoint.initial_load_path={dcp_base}", "--checkpoint.last_save_model_only"]
    train(tmp_path, *options)
    _, message = failing(tmp_path, *options, "--training.steps=5")
    assert f"{tmp_path}/checkpoint/step-3 holds no optimizer state: it is the end of a finished run" in message
    assert "to train on from adapters alone, name them as lora.initial_adapter_path" in message
    _, message = failing(tmp_path, *options, "--training.steps=5", "--checkpoint.load_step=3")
    assert message.endswith("or resume an earlier step with checkpoint.load_step.")
