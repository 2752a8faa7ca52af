"""Jobs with a magnitude per row (DoRA): steps, resume, PEFT's directory out and in, the merge, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import Run, adapter_state, build, finish, train
from hf_tiny import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_converter.cli import main
from lora_converter.hf.magnitudes import NO_VLLM
from lora_converter.hf.peft_config import WEIGHTS_FILE

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))


def options(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def logits(run: Run) -> torch.Tensor:
    model = run.trainer.model_parts[0]
    model.eval()
    with torch.no_grad():
        return model(TOKENS)


def test_a_job_begins_as_the_base_resumes_and_is_no_plain_one(hf_base: Path, tmp_path: Path) -> None:
    job = [*options(hf_base), "--lora.use_dora", "--checkpoint.interval=2", "--checkpoint.no-last_save_model_only"]
    plain = train(tmp_path / "plain", *options(hf_base), "--training.steps=1")
    whole = train(tmp_path / "whole", *job, "--training.steps=4")
    assert whole.losses[0] == plain.losses[0]
    first = train(tmp_path / "parts", *job, "--training.steps=4", "--checkpoint.interval=2")
    (tmp_path / "parts" / "checkpoint" / "step-4").rename(tmp_path / "away")
    second = train(tmp_path / "parts", *job, "--training.steps=4")
    assert first.losses == whole.losses and second.losses == whole.losses[2:]
    state = adapter_state(whole)
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(second).items())
    assert state["layers.0.attention.wq.lora_magnitude_change"].any()
    other = build(tmp_path / "parts", *options(hf_base), "--training.steps=6")
    with pytest.raises(ValueError, match=r"lora\.use_dora is True there and False here"):
        finish(other)
    other.trainer.close()


@pytest.fixture
def exported(hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Run, Path]:
    results = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged"]
    run = train(tmp_path / "run", *options(hf_base), "--lora.use_dora", "--optimizer.lr=0.02", *results)
    assert NO_VLLM in caplog.messages
    return run, tmp_path / "run" / "checkpoint"


def test_peft_has_the_logits_of_the_trained_model_and_of_the_merged_one(exported: tuple[Run, Path]) -> None:
    run, folder = exported
    base = tiny_llama()
    with torch.no_grad():
        untouched, expected = base(input_ids=TOKENS).logits, logits(run)
        assert (expected - untouched).abs().max() > 1e-2
        theirs = PeftModel.from_pretrained(base, folder / "step-3")
        assert theirs.peft_config["default"].use_dora
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged-3")
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_peft_made_gives_its_logits_here(hf_base: Path, tmp_path: Path) -> None:
    settings = LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "up_proj"], use_dora=True)
    twin = get_peft_model(tiny_llama(), settings)
    with torch.no_grad():
        for name, param in twin.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name))))
        expected = twin(input_ids=TOKENS).logits
    twin.save_pretrained(tmp_path / "peft")
    run = build(tmp_path / "run", *options(hf_base), f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    run.trainer.checkpointer.load()
    assert run.trainer.checkpointer.run.config.use_dora
    torch.testing.assert_close(logits(run), expected, rtol=1e-5, atol=1e-5)
    run.trainer.close()


def test_a_step_becomes_a_directory_beside_its_base_alone(hf_base: Path, tmp_path: Path) -> None:
    results = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--checkpoint.interval=2"]
    job = [*options(hf_base), "--lora.use_dora", "--optimizer.lr=0.02"]
    run = train(tmp_path / "run", *job, *results, "--training.steps=3")
    steps = train(tmp_path / "steps", *job, "--training.steps=3", "--checkpoint.no-last_save_model_only")
    assert run.losses == steps.losses
    step = tmp_path / "steps" / "checkpoint" / "step-3"
    assert main(["export", "--checkpoint", str(step), "--output", str(tmp_path / "adapter")]) == 0
    mine, its = (
        load_file(f / WEIGHTS_FILE) for f in (tmp_path / "adapter", tmp_path / "run" / "checkpoint" / "step-3")
    )
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[name]) for name, value in mine.items() if "magnitude" not in name)
    assert all(torch.allclose(value, its[name], rtol=1e-6) for name, value in mine.items())


def test_norms_are_those_of_the_base_that_is_named_and_never_of_codes(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(hf_base, tmp_path / "base"))
    job = [*options(base), "--lora.use_dora", "--training.steps=1", "--checkpoint.no-last_save_model_only"]
    train(tmp_path / "run", *job)
    step, moved = str(tmp_path / "run" / "checkpoint" / "step-1"), base.rename(tmp_path / "moved")
    assert main(["inspect", step]) == 1
    assert "with --base" in capsys.readouterr().err
    assert main(["inspect", step, "--base", str(moved)]) == 0
    caplog.clear()
    assert main(["export", "--checkpoint", step, "--output", str(tmp_path / "adapter"), "--base", str(moved)]) == 0
    assert [text for text in caplog.messages if f"base is '{base}'" in text and f"taken from {moved}" in text]
    weights = load_file(moved / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, key: weights[key].to(torch.float8_e4m3fn)}, moved / "model.safetensors", {"format": "pt"})
    export = ["export", "--checkpoint", step, "--output", str(tmp_path / "no"), "--base", str(moved)]
    assert main(export) == 1 and not (tmp_path / "no").exists()
    assert f"has no unquantized {key}" in capsys.readouterr().err
