"""`lora.train_also`: modules whose own weights train beside the adapters, in torchtitan's trainer, on one rank."""

import json
import logging
from pathlib import Path

import pytest
import torch
from harness import Run, adapter_state, build, finish, full_state, train
from safetensors.torch import load_file
from test_checkpoint import failing
from torch.distributed.checkpoint import FileSystemReader

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.fingerprint import base_fingerprint

IN_FULL = "--lora.train_also=tok_embeddings,norm,layers.*.ffn_norm"
NAMES = {"tok_embeddings.weight", "norm.weight", *(f"layers.{layer}.ffn_norm.weight" for layer in range(4))}
SCHEDULE = ["--checkpoint.interval=2", "--lr_scheduler.total_steps=8", "--lr_scheduler.warmup_steps=2"]


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *SCHEDULE]


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: value for name, value in adapter_state(run).items() if "lora_" not in name}


def test_what_is_named_starts_from_the_base_and_trains_and_nothing_else_does(hf_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *on(hf_base), IN_FULL, "--training.mixed_precision_param=bfloat16")
    run.trainer.checkpointer.load()
    before = full_state(run)
    assert trained(run).keys() == NAMES
    in_file = load_file(hf_base / "model.safetensors")
    assert torch.equal(before["tok_embeddings.weight"], in_file["model.embed_tokens.weight"])
    finish(run)
    after = full_state(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "lora_" not in name} == NAMES
    # What trains is an fp32 master, whatever the dtype that frozen weights are stored in.
    assert all(after[name].dtype is torch.float32 for name in NAMES)
    frozen = [p for n, p in run.trainer.model_parts[0].named_parameters() if n.endswith("wq.weight")]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


def test_a_step_holds_it_beside_the_adapters_and_a_run_goes_on_bit_for_bit(hf_base: Path, tmp_path: Path) -> None:
    options = [*on(hf_base), IN_FULL, "--lora.train_also_lr=1e-3", "--optimizer.weight_decay=0.1"]
    whole = train(tmp_path / "whole", *options, "--training.steps=4")
    train(tmp_path / "run", *options, "--training.steps=2")
    again = build(tmp_path / "run", *options, "--training.steps=4")
    finish(again)
    assert again.losses == whole.losses[2:]
    expected, found = full_state(whole), full_state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    stored = FileSystemReader(tmp_path / "run" / "checkpoint" / "step-2").read_metadata().state_dict_metadata
    assert {n for n in stored if n.endswith("norm.weight") and "." not in n.removesuffix(".weight")} == {"norm.weight"}
    assert not any(name.endswith(("wq.weight", "output.weight")) and "optimizer" not in name for name in stored)
    groups = sorted(name for name in stored if "param_groups" in name and name.endswith((".lr", ".weight_decay")))
    own = ("lr", "train_also.lr", "train_also.weight_decay", "weight_decay")
    assert groups == [f"optimizer.param_groups.{name}" for name in own]


def test_new_rates_of_both_groups_are_taken_and_said(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, *on(hf_base), IN_FULL, "--training.steps=2", "--optimizer.lr=1e-3", "--lora.train_also_lr=1e-4")
    caplog.set_level(logging.INFO)
    new = ["--optimizer.lr=1e-5", "--optimizer.weight_decay=0.1", "--lora.train_also_lr=1e-12", "--training.steps=4"]
    run = build(tmp_path, *on(hf_base), IN_FULL, *new)
    run.trainer.checkpointer.load()
    before = trained(run)
    groups = run.trainer.optimizers.optimizers[0].param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(1e-5, 0.1), (1e-12, 0.0)]
    told = sorted(text for text in caplog.messages if " -> " in text and text.startswith("LoRA:"))
    assert told == [
        "LoRA: learning rate of lora.train_also 0.0001 -> 1e-12",
        "LoRA: optimizer.lr 0.001 -> 1e-05",
        "LoRA: optimizer.weight_decay 0 -> 0.1",
    ]
    finish(run)
    assert max((trained(run)[name] - value).abs().max().item() for name, value in before.items()) < 1e-10


def test_a_run_without_it_stores_what_it_always_did(hf_base: Path, tmp_path: Path) -> None:
    train(tmp_path, *on(hf_base), "--training.steps=2")
    stored = FileSystemReader(tmp_path / "checkpoint" / "step-2").read_metadata().state_dict_metadata
    assert not any("train_also" in name for name in stored)
    described = tmp_path / "checkpoint" / "step-2" / "lora.json"
    old = json.loads(described.read_text())
    for name in ("train_also", "train_also_lr"):
        del old["lora"][name]  # as an older version wrote it
    described.write_text(json.dumps(old))
    assert len(train(tmp_path, *on(hf_base)).losses) == 1


@pytest.mark.parametrize(("there", "here"), [(True, False), (False, True)])
def test_other_modules_than_the_steps_are_refused_by_name(
    there: bool, here: bool, hf_base: Path, tmp_path: Path
) -> None:
    train(tmp_path, *on(hf_base), *[IN_FULL] * there, "--training.steps=2")
    _, message = failing(tmp_path, *on(hf_base), *[IN_FULL] * here)
    assert f"6 modules train in full only {'there' if there else 'here'}, by lora.train_also: layers.0.ffn" in message
    if there:  # patterns that mean the same modules are the same setting
        same = "--lora.train_also=tok_embeddings,norm,ffn_norm"
        assert len(train(tmp_path, *on(hf_base), same).losses) == 1


def test_a_random_base_is_stored_once_with_it(tmp_path: Path) -> None:
    options = ["--checkpoint.initial_load_path=", *SCHEDULE, IN_FULL]
    whole = train(tmp_path / "whole", *options, "--training.steps=4")
    train(tmp_path / "run", *options, "--training.steps=2")
    again = train(tmp_path / "run", *options, "--training.steps=4")
    assert again.losses == whole.losses[2:]


def test_the_fingerprint_is_that_of_the_frozen_weights(hf_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *on(hf_base), IN_FULL)
    run.trainer.checkpointer.load()
    before = base_fingerprint(run.trainer.model_parts[0])
    finish(run)
    assert base_fingerprint(run.trainer.model_parts[0]) == before == run.trainer.checkpointer.run.model.base_fingerprint


def test_a_tied_weight_trains_once_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tiny_models import MODELS

    caplog.set_level(logging.INFO)
    options = [*MODELS["qwen3_tied"], "--checkpoint.initial_load_path=", *SCHEDULE]
    both = train(tmp_path / "both", *options, "--lora.train_also=tok_embeddings,output", "--training.steps=4")
    assert "LoRA: tok_embeddings.weight is output.weight as well: one weight, trained once." in caplog.messages
    assert [len(group["params"]) for group in both.trainer.optimizers.optimizers[0].param_groups][1] == 1
    one = train(tmp_path / "one", *options, "--lora.train_also=output", "--training.steps=2")
    assert list(trained(one)) == ["output.weight"]
    again = train(tmp_path / "one", *options, "--lora.train_also=output", "--training.steps=4")
    assert one.losses + again.losses == both.losses


def test_a_head_that_trains_gets_torchtitans_loss_over_logits(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build(tmp_path, *on(hf_base), "--lora.train_also=output").trainer.close()
    assert "LoRA: torchtitan's loss, over all logits: the output head is trained." in caplog.messages


def test_what_is_not_finite_or_gets_no_gradient_is_named(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build(tmp_path, *on(hf_base), IN_FULL, "--checkpoint.interval=1", "--training.steps=2")
    train_step = run.trainer.train_step

    def poisoned(data):  # type: ignore[no-untyped-def]
        train_step(data)
        run.trainer.model_parts[0].norm.weight.data.fill_(torch.nan)

    run.trainer.train_step = poisoned
    finish(run)
    assert "step 1 is not saved" in caplog.text and "hold nan or inf: norm." in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.train_also=tok_embedding"], "lora.train_also: 'tok_embedding' matches no module of the model; those"),
        (["--lora.train_also=all-linear"], "lora.train_also: 'all-linear' matches no module of the model"),
        (["--lora.train_also=wq"], "wq has an adapter. Add layers.0.attention.wq to lora.exclude_modules"),
        ([IN_FULL, "--training.dtype=bfloat16"], "lora.train_also with training.dtype = 'bfloat16': what trains is"),
    ],
)
def test_what_cannot_train_is_refused(options: list[str], message: str, hf_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        build(tmp_path, *on(hf_base), *options)
    assert message in str(error.value)


def test_a_weight_shared_with_an_adapted_module_is_refused() -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(6, 4), "q": torch.nn.Linear(4, 4), "lm_head": torch.nn.Linear(4, 6)}
    )
    model["lm_head"].weight = model["embed"].weight
    config = LoRAConfig(rank=2, target_modules=["q", "lm_head"], train_also=["embed"])
    with pytest.raises(ValueError, match="embed shares its weight with lm_head, which has an adapter"):
        apply_lora(model, config)
    assert not adapter_parameters(model)
