"""`lora-converter` on what torchtitan 0.3's jobs leave behind: step folders, PEFT directories, a base."""

from pathlib import Path

import pytest
import torch
from jobs03 import build, config, fill_b_when_loaded, finish
from safetensors.torch import load_file

from lora_converter.cli import main
from lora_converter.titan03 import models


def test_a_step_folder_is_exported_inspected_and_merged(
    hf_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = dict(checkpoint__initial_load_path=str(hf_base), checkpoint__initial_load_in_hf=True, training__steps=2)
    of_peft = dict(checkpoint__last_save_in_hf=True, checkpoint__last_save_model_only=True)
    for name, options in (("step", {}), ("peft", of_peft)):
        run = build(config(tmp_path / name, **base, **options))
        fill_b_when_loaded(run)
        finish(run)
    step, exported = tmp_path / "step" / "checkpoint" / "step-2", tmp_path / "exported"
    # the tiny model is no flavor of torchtitan's
    monkeypatch.setattr(models, "spec_of", lambda *names: config(tmp_path).model_spec)
    assert main(["export", "--checkpoint", str(step), "--output", str(exported)]) == 0, capsys.readouterr().err
    ours = load_file(exported / "adapter_model.safetensors")
    by_the_job = load_file(tmp_path / "peft" / "checkpoint" / "step-2" / "adapter_model.safetensors")
    assert ours.keys() == by_the_job.keys() and len(ours) == 56
    assert all(torch.equal(ours[name], by_the_job[name]) for name in ours)
    assert main(["inspect", str(step)]) == 0
    assert "model.layers.0.self_attn.q_proj  64 x 64" in capsys.readouterr().out
    merge = ["merge", "--base", str(hf_base), "--adapter", str(exported), "--output", str(tmp_path / "merged")]
    assert main(merge) == 0, capsys.readouterr().err


def test_models_are_found_by_the_names_of_either_torchtitan() -> None:
    for flavor in ("debugmodel", "debugmodel_flex_attn"):
        found = models.model_on_meta("llama3", flavor)
        assert "layers.0.attention.wq.weight" in {found.canonical_name(name) for name in found.model.state_dict()}
    assert models.model_on_meta("mine", "0.6B", "torchtitan.models.qwen3").model.config.dim == 1024
    with pytest.raises(ValueError, match=r"model\.flavor = '9B': torchtitan 0\.3's qwen3 has debugmodel, "):
        models.model_on_meta("qwen3", "9B")
