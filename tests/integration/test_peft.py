"""Adapters out to PEFT and in from PEFT, against PEFT itself on transformers' own models."""

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import Run, build, train
from hf_models import HF_MODELS, save_hf
from hf_tiny import save_gpt_oss, tiny_gpt_oss
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention
from torchtitan.models.attention import FlexAttentionWrapper
from transformers import PreTrainedModel

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


def peft_twin(model: PreTrainedModel, targets: Sequence[str] | str) -> PeftModel:
    """`model` with an adapter by PEFT that does something."""
    twin = get_peft_model(model, LoraConfig(r=5, lora_alpha=7, target_modules=targets))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return twin.eval()


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


# PEFT looks for the keys of its patterns among the modules that it adapts, and not among stacked experts.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_an_adapter_that_peft_made_gives_its_logits_here(job, tmp_path: Path) -> None:
    twin = peft_twin(HF_MODELS[job[0]].make(), HF_MODELS[job[0]].targets)
    with torch.no_grad():
        expected = twin(input_ids=TOKENS).logits
    twin.save_pretrained(tmp_path / "peft")
    run = build(tmp_path / "run", *job[1], f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    run.trainer.checkpointer.load()
    assert (run.trainer.checkpointer.run.config.rank, run.trainer.checkpointer.run.config.alpha) == (5, 7.0)
    torch.testing.assert_close(logits(run), expected, rtol=1e-5, atol=HF_MODELS[job[0]].atol)
    run.trainer.close()


def test_gpt_oss_takes_an_adapter_of_pefts_and_gives_it_back(tmp_path: Path) -> None:
    """Forwards alone: FlexAttention has no CPU backward, and uncompiled it returns what the sinks need."""
    base = tiny_gpt_oss()
    path = save_gpt_oss(base, tmp_path / "base")
    twin = peft_twin(base, ["q_proj", "k_proj", "v_proj", "o_proj"])
    twin.save_pretrained(tmp_path / "peft")
    options = ["--model.name=gpt_oss", "--model.flavor=hf_tiny", "--lora.rank=16", "--checkpoint.initial_load_in_hf"]
    start = [f"--checkpoint.initial_load_path={path}", f"--lora.initial_adapter_path={tmp_path}/peft"]
    run = build(tmp_path / "run", *options, *start)
    model = run.trainer.model_parts[0].float().eval()
    run.trainer.checkpointer.load()
    masks = model.get_attention_masks(input_batch=TOKENS, tokenizer=run.trainer.tokenizer)
    with torch.no_grad(), mock.patch.object(FlexAttentionWrapper, "_compiled_flex_attn", flex_attention):
        actual = model(TOKENS, attention_masks=masks)
        expected = twin(input_ids=TOKENS).logits
        with twin.disable_adapter():
            assert (expected - twin(input_ids=TOKENS).logits).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "again"))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    run.trainer.close()


def test_a_linear_without_a_hugging_face_name_is_refused_before_the_training(tmp_path: Path) -> None:
    """Llama 4's dense layers: torchtitan's adapter knows the experts' layers alone."""
    hf = ["--checkpoint.initial_load_path=/", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    with pytest.raises(ValueError, match=r"no Hugging Face name for 3 adapted modules: layers\.0\.feed_forward\.w1, "):
        build(tmp_path, "--model.name=llama4", "--model.flavor=hf_tiny_dense", *hf)


def test_save_merged_writes_a_model_that_transformers_loads(job, tmp_path: Path) -> None:
    run, path = export(tmp_path / "run", job, "--lora.save_merged")
    merged, loading = type(HF_MODELS[job[0]].make()).from_pretrained(
        path.with_name("merged-3"), attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        expected = merged.eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(run), expected, rtol=1e-5, atol=HF_MODELS[job[0]].atol)


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
    assert "adapted modules as a PEFT directory" in capsys.readouterr().out
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
