"""Adapters out to PEFT and in from PEFT, against PEFT itself on transformers' own models."""

from pathlib import Path

import pytest
import torch
from harness import Run, build, train
from hf_models import HF_MODELS, save_hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict

from lora_converter.cli import main
from lora_converter.peft import PeftAdapter, save_peft

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))


def logits(run: Run) -> torch.Tensor:
    model = run.trainer.model_parts[0]
    model.eval()
    with torch.no_grad():
        return model(TOKENS)


@pytest.fixture(params=list(HF_MODELS))
def job(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """A model's name and the options of a job on its Hugging Face folder."""
    name = request.param
    base = save_hf(name, tmp_path / "base")
    return name, [*HF_MODELS[name].options, f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def export(folder: Path, job: tuple[str, list[str]], *options: str) -> tuple[Run, Path]:
    run = train(folder, *job[1], "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", *options)
    return run, folder / "checkpoint" / "step-3"


def test_an_exported_adapter_gives_peft_the_logits_of_the_trained_model(job, tmp_path: Path) -> None:
    run, path = export(tmp_path / "run", job, "--lora.use_rslora")
    base = HF_MODELS[job[0]].make()
    with torch.no_grad():
        untouched = base(input_ids=TOKENS).logits
    model = PeftModel.from_pretrained(base, path)
    result = set_peft_model_state_dict(model, load_peft_weights(path))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    assert (expected - untouched).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(logits(run), expected, rtol=1e-5, atol=HF_MODELS[job[0]].atol)


def test_an_adapter_that_peft_made_gives_its_logits_here(job, tmp_path: Path) -> None:
    twin = get_peft_model(
        HF_MODELS[job[0]].make(), LoraConfig(r=5, lora_alpha=7, target_modules=HF_MODELS[job[0]].targets)
    )
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = twin.eval()(input_ids=TOKENS).logits
    twin.save_pretrained(tmp_path / "peft")
    run = build(tmp_path / "run", *job[1], f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    run.trainer.checkpointer.load()
    assert (run.trainer.checkpointer.settings.rank, run.trainer.checkpointer.settings.alpha) == (5, 7.0)
    torch.testing.assert_close(logits(run), expected, rtol=1e-5, atol=HF_MODELS[job[0]].atol)
    run.trainer.close()


def test_export_import_export_is_byte_identical(job, tmp_path: Path) -> None:
    _, first = export(tmp_path / "first", job)
    _, second = export(
        tmp_path / "second", job, f"--lora.initial_adapter_path={first}", "--optimizer.lr=0", "--lora.rank=16"
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_command_line_exports_a_step_folder_as_the_trainer_does(job, tmp_path: Path, capsys) -> None:
    _, expected = export(tmp_path / "run", job)
    train(tmp_path / "same", *job[1])
    step = tmp_path / "same" / "checkpoint" / "step-3"
    assert main(["export", "--checkpoint", str(step), "--output", str(tmp_path / "peft")]) == 0
    assert "adapted linears as a PEFT directory" in capsys.readouterr().out
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (expected / name).read_bytes()
    assert main(["inspect", str(step), "--base", str(tmp_path / "base")]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", str(expected), "--base", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out == shown
    assert "rank 4, alpha 32, scaling 8, dropout 0" in shown and shown.count("% of |weight|") == shown.count(" x ")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is no complete step folder of a LoRA run" in capsys.readouterr().err


def test_inspect_flags_zero_and_broken_updates(tmp_path: Path, capsys) -> None:
    factors = {
        "fine": (torch.ones(2, 4), torch.ones(3, 2)),
        "zero": (torch.ones(2, 4), torch.zeros(3, 2)),
        "broken": (torch.ones(2, 4), torch.full((3, 2), torch.nan)),
    }
    save_peft(PeftAdapter(factors, 2, 2.0, 0.0, False, list(factors)), tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if " x " in line}
    assert lines["fine"].endswith("|update| 6.928e+00")  # 2 in each of 12 elements
    assert lines["zero"].endswith("ALL ZERO") and lines["broken"].endswith("NOT FINITE")
