"""Jobs whose factors begin at the base: what their steps hold, how they go on, what they export. One rank."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from harness import adapter_state, build, finish, train
from hf_tiny import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoint import failing
from torch.distributed.checkpoint import FileSystemReader

from lora_converter.cli import main
from lora_converter.offset import initial_factors
from lora_converter.peft import load_peft

LINEARS = ["q_proj", "down_proj"]


def options(base: Path, init: str = "pissa") -> list[str]:
    return [
        f"--checkpoint.initial_load_path={base}",
        "--checkpoint.initial_load_in_hf",
        f"--lora.init={init}",
        "--checkpoint.interval=1",
    ]


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoint" / f"step-{number}"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_job_begins_at_its_base_and_goes_on_bit_for_bit(init: str, hf_base: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *options(hf_base, init), "--training.steps=4")
    plain = train(tmp_path / "plain", *options(hf_base, ""), "--training.steps=1")
    assert whole.losses[0] == plain.losses[0]
    stored = FileSystemReader(step(tmp_path / "whole", 2)).read_metadata().state_dict_metadata
    assert adapter_state(whole).keys() <= stored.keys()
    assert any(name.endswith("lora_a0.weight") for name in stored)
    again = train(tmp_path / "whole", *options(hf_base, init), "--training.steps=4", "--checkpoint.load_step=2")
    assert again.losses == whole.losses[2:]
    expected, found = adapter_state(whole), adapter_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_factors_are_those_of_the_loaded_weight_and_a_resume_computes_none(
    hf_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tmp_path, *options(hf_base), "--training.steps=2")
    run.trainer.checkpointer.load()
    weights, state = dict(run.trainer.model_parts[0].named_parameters()), adapter_state(run)
    for fqn in ("layers.0.attention.wq", "layers.3.feed_forward.w2"):
        config = run.trainer.model_parts[0].get_submodule(fqn).lora_config
        a, b = initial_factors(weights[f"{fqn}.weight"], config, name=fqn)
        for name, factor in (("lora_a", a), ("lora_b", b), ("lora_a0", a), ("lora_b0", b)):
            assert torch.equal(state[f"{fqn}.{name}.weight"], factor) and factor.any()
    finish(run)
    monkeypatch.setattr("lora_converter.run.initial_factors.initial_factors", None)
    train(tmp_path, *options(hf_base), "--training.steps=3")


def test_an_export_is_a_plain_adapter_of_twice_the_rank(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps=3"]
    run = train(tmp_path, *options(hf_base), *end, "--lora.rank_pattern", "wo", "3")
    assert "plain adapters of twice their rank, up to 8: a server's limit" in caplog.text
    path = step(tmp_path, 3)
    assert {a.shape[0] for a, _ in load_peft(path).factors.values()} == {8, 6}
    model = PeftModel.from_pretrained(tiny_llama(), path)
    inputs = run.batches[0][0]
    with torch.no_grad():
        want = run.trainer.model_parts[0](inputs)
        torch.testing.assert_close(model(inputs).logits, want, atol=2e-5, rtol=1e-5)
        assert (want - tiny_llama()(inputs).logits).abs().max() > 1e-3


def test_a_step_of_another_beginning_is_refused(hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path, *options(hf_base), "--training.steps=1")
    _, message = failing(tmp_path, *options(hf_base, ""))
    assert "lora.init is 'pissa' there and '' here" in message


def test_a_peft_directory_says_where_it_begins(hf_base: Path, tmp_path: Path) -> None:
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps=2"]
    first = train(tmp_path / "first", *options(hf_base), *end)
    start = [*options(hf_base)[:2], f"--lora.initial_adapter_path={step(tmp_path / 'first', 2)}", "--lora.rank=16"]
    with pytest.raises(
        ValueError, match=r"lora\.init = 'pissa', but the adapter in .* Leave lora\.init out\."
    ) as error:
        build(tmp_path / "next", *start, "--lora.init=pissa")
    assert "says where it begins. Leave lora.init out." in str(error.value)
    run = build(tmp_path / "next", *start)
    run.trainer.checkpointer.load()
    inputs = first.batches[0][0]
    with torch.no_grad():
        want, found = (each.trainer.model_parts[0](inputs) for each in (first, run))
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
    run.trainer.close()


def test_a_step_folder_is_exported_as_the_trainer_would_have(hf_base: Path, tmp_path: Path) -> None:
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps=2"]
    for folder, more in (("dcp", []), ("peft", end)):
        train(tmp_path / folder, *options(hf_base, "olora"), "--training.steps=2", "--lora.use_rslora", *more)
    arguments = ["--checkpoint", str(step(tmp_path / "dcp", 2)), "--output", str(tmp_path / "exported")]
    assert main(["export", *arguments]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (step(tmp_path / "peft", 2) / name).read_bytes()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_job_goes_on_from_what_peft_saved_without_converting_it(init: str, hf_base: Path, tmp_path: Path) -> None:
    twin = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS, init_lora_weights=init))
    for index, param in enumerate(p for p in twin.parameters() if p.requires_grad):
        param.data += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
    twin.save_pretrained(tmp_path / "adapter")
    start = [*options(hf_base)[:2], f"--lora.initial_adapter_path={tmp_path}/adapter", "--lora.rank=16"]
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps=2"]
    run = build(tmp_path / "run", *start, *end, "--checkpoint.interval=1")
    run.trainer.checkpointer.load()
    inputs = torch.arange(24).view(2, 12) * 7 % 320
    with torch.no_grad():  # rows of q and k have another order here, so that fp32 sums of the decomposition differ
        torch.testing.assert_close(run.trainer.model_parts[0](inputs), twin(inputs).logits, atol=1e-4, rtol=1e-4)
    finish(run)
    # A resume takes A₀ and B₀ from the step.
    again = build(tmp_path / "run", *start, *end, "--checkpoint.load_step=1")
    again.trainer.checkpointer.load()
    assert sum(name.endswith("lora_a0.weight") for name in adapter_state(again)) == len(LINEARS) * 4
    again.trainer.close()
    exported = PeftModel.from_pretrained(tiny_llama(), step(tmp_path / "run", 2))
    with torch.no_grad():
        want = run.trainer.model_parts[0](inputs)
        torch.testing.assert_close(exported(inputs).logits, want, atol=2e-5, rtol=1e-5)
        assert (want - twin(inputs).logits).abs().max() > 1e-4
    told = rf"has {init!r}\. Leave lora\.init out to take the adapter's\."
    with pytest.raises(ValueError, match=told):
        build(tmp_path / "other", *start, f"--lora.init={'olora' if init == 'pissa' else 'pissa'}")


def test_a_run_that_is_over_is_known_to_be(hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps=2"]
    first = train(tmp_path, *options(hf_base), *end)
    caplog.set_level(logging.INFO)
    again = build(tmp_path, *options(hf_base), *end)
    again.trainer.checkpointer.load()
    assert "the run ended at step 2; there is nothing left to train" in caplog.text
    with torch.no_grad():
        want, found = (each.trainer.model_parts[0](first.batches[0][0]) for each in (first, again))
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
    again.trainer.close()


def test_a_base_that_is_not_finite_has_no_factors_and_is_told_by_name(hf_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(hf_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = build(tmp_path / "run", *options(base))
    with pytest.raises(ValueError, match=r"the base's weights of layers\.1\.attention\.wo hold nan"):
        run.trainer.checkpointer.load()
