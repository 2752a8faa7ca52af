"""What messages of torchtitan 0.3's host ask for: done, the job is what it would have been."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs03 import build, config, host_config, train, trained_tensors
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.lora import LoRAConverter
from torchtitan.models import llama3
from torchtitan.trainer import Trainer

from lora_converter.cli import main
from lora_converter.titan03 import chat, lora
from lora_converter.titan03.checkpoint import LoRACheckpointManager
from lora_converter.titan03.checks import check_settings
from lora_converter.titan03.model import made_of
from lora_converter.titan03.trainer import LoRATrainer
from lora_converter.titans import chosen
from lora_converter.toml03 import job as from_toml
from lora_converter.toml03 import start


def say(version: str | None) -> Any:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return found


@pytest.mark.parametrize("version", [None, "0.2.1"])
def test_a_host_is_installed_by_an_extra(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen.room() == "titan03"
    monkeypatch.setattr(importlib.metadata, "version", say(version))
    with pytest.raises(ValueError) as error:
        chosen.room()
    for extra, then in (("titan022", "0.2.2"), ("titan03", "0.3.0")):
        assert f"`pip install lora-converter[{extra}]`" in str(error.value)
        assert "Install one with" in str(error.value) and "in an environment of its own" in str(error.value)
        monkeypatch.setattr(importlib.metadata, "version", say(then))
        assert chosen.room() == chosen.ROOMS[then]


def test_what_needs_the_other_torchtitan_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "configs/debug_lora.toml"]) == 1
    told = capsys.readouterr().err
    assert "`lora-converter plan` does not work with torchtitan 0.3 yet: it is built from parts of" in told
    assert "Use an environment with `pip install lora-converter[titan022]`." in told
    monkeypatch.setattr(importlib.metadata, "version", say("0.2.2"))
    assert importlib.util.find_spec(f"lora_converter.{chosen.room()}.plan") is not None


def toml_job(*arguments: str) -> Any:
    from_toml.arguments = list(arguments)
    return from_toml.job()


def test_a_job_is_named() -> None:
    with pytest.raises(ValueError, match=r"No job is named: give --job.config_file my.toml, or --module and --config"):
        toml_job("--training.steps=3")
    assert toml_job("--training.steps=3", "--job.config_file", "configs/debug_lora.toml").training.steps == 3


def test_a_job_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["train", "--module", "my_configs", "--config", "f", "--job.config_file=configs/debug_lora.toml"]
    monkeypatch.setattr("sys.argv", both)
    with pytest.raises(ValueError, match=r"Give --job\.config_file my\.toml, or --module and --config"):
        start.main()
    with pytest.raises(ValueError, match=r"No job is named: give --job\.config_file my\.toml, or"):
        toml_job()
    assert toml_job(*both[5:]).lora.rank == 16


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[job", "job.config_file = .*: Expected"),
        ("[training]\nsteps = '10'", "my.toml: The field .training.steps. is annotated with type `<class 'int'>`"),
        ("[training]\nmixed_precision_param = 'fp32'", "The field .training.mixed-precision-param. is annotated"),
        (
            "[job]\ncustom_config_module = 'mine'",
            "job.custom_config_module = 'mine' .a config function has what it adds",
        ),
    ],
)
def test_a_file_that_cannot_be_is_told_by_name(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        toml_job(f"--job.config_file={tmp_path / 'my.toml'}")
    with pytest.raises(ValueError, match=r"job\.config_file = 'nowhere\.toml': .*No such file"):
        toml_job("--job.config_file=nowhere.toml")


def test_settings_of_adapters_without_any_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "my.toml").write_text("[lora]\nrank = 8\n")
    with caplog.at_level("WARNING"):
        toml_job(f"--job.config_file={tmp_path / 'my.toml'}")
    assert '[lora] is set, but model.converters has no "lora": every weight trains.' in caplog.text


PARTS = {
    "print the model from a config function": "--model.print_after_conversion",
    "train it as a job of its own": "--lora.full_phase.steps=3",
    "it is that of training": "--validation.seq_len=64",
}


@pytest.mark.parametrize("asked", PARTS)
def test_what_cannot_be_translated_is_left_out(asked: str) -> None:
    job = ["--job.config_file=configs/debug_lora.toml", "--validation.enable"]
    with pytest.raises(ValueError, match=asked):
        toml_job(*job, PARTS[asked])
    assert toml_job(*job).validator.enable


def test_the_first_of_two_phases_is_a_job_of_its_own(tmp_path: Path) -> None:
    first = host_config(tmp_path / "all", training__steps=1, checkpoint__last_save_model_only=True)
    result = train(first).trainer.checkpointer.folder + "/step-1"
    run = train(lora(host_config(tmp_path / "lora", training__steps=1, checkpoint__initial_load_path=result), rank=4))
    assert trained_tensors(run) == 56


def test_adapters_are_put_on_once(tmp_path: Path) -> None:
    plain = host_config(tmp_path)
    with pytest.raises(ValueError, match=r"Call lora\(\) once, with all settings"):
        lora(lora(plain, rank=4), alpha=8.0)
    assert lora(plain, rank=4, alpha=8.0).lora.alpha == 8.0
    plain.model_spec = llama3.model_registry("debugmodel", converters=[LoRAConverter.Config(rank=8)])
    with pytest.raises(ValueError, match=r"Leave it out of model_registry\(converters=...\)"):
        lora(plain)
    plain.model_spec = llama3.model_registry("debugmodel", converters=[])
    lora(plain)


def test_new_tokens_are_left_out(tmp_path: Path) -> None:
    """Or trained on torchtitan 0.2.2, see test_remedies_of_new_tokens.py."""
    asked = "Train them on torchtitan 0.2.2, or leave new_tokens out"
    with pytest.raises(ValueError, match=asked):
        check_settings(lora(host_config(tmp_path), new_tokens=["<a>"]))
    check_settings(lora(host_config(tmp_path)))


def test_the_loss_has_chunks_of_its_own(tmp_path: Path) -> None:
    chunks = ".* Leave it out, and set --loss.num_chunks"
    with pytest.raises(ValueError, match=f"lora.loss_chunk_tokens = 64: {chunks}"):
        check_settings(lora(host_config(tmp_path), loss_chunk_tokens=64))
    one, many = (
        train(lora(host_config(tmp_path / str(n), training__steps=1, loss__num_chunks=n), rank=4)).losses
        for n in (1, 4)
    )
    assert one == pytest.approx(many, rel=1e-5)  # sums in another order


def test_a_checkpointer_of_ones_own_knows_adapters(tmp_path: Path) -> None:
    """Derive it from LoRACheckpointManager.Config, since torchtitan's would store the whole model."""

    def manager(parent: Any) -> Any:
        class Manager(parent):  # type: ignore[misc]
            @dataclass(kw_only=True, slots=True)
            class Config(parent.Config):  # type: ignore[misc]
                pass

        return Manager

    job = config(tmp_path, training__steps=1)
    job.checkpoint = made_of(manager(CheckpointManager).Config, job.checkpoint)
    with pytest.raises(ValueError, match=r"knows no adapters\. Derive it from LoRACheckpointManager\.Config"):
        build(job)
    job.checkpoint = made_of(manager(LoRACheckpointManager).Config, job.checkpoint)
    assert type(train(job).trainer.checkpointer).__name__ == "Manager"


def test_a_trainer_of_ones_own_knows_adapters(tmp_path: Path) -> None:
    """Derive it from LoRATrainer.Config, or from ChatTrainer.Config."""

    def trainer(parent: Any) -> Any:
        class Mine(parent):  # type: ignore[misc]
            @dataclass(kw_only=True, slots=True)
            class Config(parent.Config):  # type: ignore[misc]
                mine: int = 3

        return Mine

    for make in (lora, lambda config: chat(config, "x.jsonl")):
        with pytest.raises(ValueError, match=r"knows no adapters\. Derive it from (LoRA|Chat)Trainer\.Config"):
            make(made_of(trainer(Trainer).Config, host_config(tmp_path)))
    job = made_of(trainer(LoRATrainer).Config, config(tmp_path, training__steps=1))
    assert chat(job, "x.jsonl").mine == 3
    assert type(train(job).trainer).__name__ == "Mine"


def test_cuda_graphs_stay_off(tmp_path: Path) -> None:
    job = config(tmp_path)
    job.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match=r"adapters are not tried in CUDA graphs\. Set it to true"):
        check_settings(job)
    job.training.disable_cuda_graphs = True
    check_settings(job)


@pytest.mark.parametrize(
    "option",
    [
        "--parallelism.expert_tensor_parallel_degree=1",
        "--optimizer.no-early-step-in-backward",
        "--checkpoint.enable-ft-dataloader-checkpoints",
        "--lora.full-phase.steps=0",
    ],
)
def test_what_asks_for_nothing_is_no_trouble(option: str) -> None:
    assert toml_job("--job.config_file=configs/debug_lora.toml", option).lora.rank == 16
