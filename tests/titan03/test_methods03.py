"""`[lora]`'s methods on torchtitan 0.3: under both backends and on ranks they are the run of one rank."""

import copy
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import jobs03
import pytest
import torch
from jobs03 import config, finish, host_config, spec_of, train
from launch import launch
from methods03 import IN_CI, TABLE
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from lora_converter import ops
from lora_converter.adapters import apply_lora, configs_of
from lora_converter.config import LoRAConfig
from lora_converter.own_names import in_own_names
from lora_converter.packed_module import packed_formats
from lora_converter.targets import select_targets
from lora_converter.titan03 import lora
from lora_converter.titan03.model import unfuse_qkv
from lora_converter.titan03.names import canonical_name
from lora_converter.titan03.sharding import TitanFactor
from lora_converter.titans import selective_ac
from lora_converter.titans.precision import store_in_compute_dtype

CI = {f"{name}, {backend}" for backend, names in IN_CI.items() for name in names.split("; ")}
ROWS = [name for name in TABLE if os.environ.get("LORA_PARITY") == "all" or name in CI]


@pytest.fixture(scope="module")
def verdicts(dcp_base: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Row -> what became of it, of those that are asked for; and of the runs of one rank."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    found = {}
    for ranks, checks in ((1, ["one rank"]), (2, [name for name in ROWS if name in asked])):
        folder = dcp_base.parent / f"methods-{ranks}"
        folder.mkdir()
        found |= launch("../titan03/methods03.py", ranks=ranks, folder=folder, checks=checks)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_the_run_of_one_rank(verdicts: dict[str, Any], name: str) -> None:
    """fp32; the bounds are those of the plain rows."""
    assert not verdicts["one rank"]["error"], verdicts["one rank"]["error"]
    verdict = verdicts[name]
    assert not verdict["error"], verdict["error"]
    print(name, {key: f"{value:.1e}" for key, value in verdict["figures"].items()})
    assert verdict["figures"]["loss"] < 1e-6
    assert verdict["figures"]["final"] < 1e-4
    assert verdict["figures"]["grad_norm"] < 1e-5


LINEARS = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"] + [f"feed_forward.w{k}" for k in (1, 2, 3)]
NAMES = [*(f"layers.{layer}.{linear}" for layer in range(4) for linear in LINEARS), "output"]
"""What torchtitan 0.2.2 calls the linears of the tiny Llama."""


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"target_modules": ["wq", "output"]},
        {"target_modules": ["attention.wq", "layers.1.attention.w?"]},
        {"target_modules": ["layers.*.attention.*", "w2"], "exclude_modules": ["*.attention.w[kv]", "layers.3.*"]},
        {"target_modules": ["*q*"]},  # qkv_linear has one, too
        {"rank_pattern": {"attention.wv": 2, "layers.0.*": 3}, "alpha_pattern": {"layers.*.attention.w[oq]": 1.5}},
    ],
)
def test_a_file_of_022_selects_the_same_linears(said: dict[str, Any]) -> None:
    settings = LoRAConfig(**said)
    if "rank_pattern" in said:
        with pytest.raises(ValueError, match=r"gives layers\.0\.attention\.qkv_linear\.wv"):
            adapted(said)
        settings.rank_pattern = {"attention.wv": 2}
    expected = select_targets(NAMES, targets=settings.target_modules, exclude=settings.exclude_modules)
    found = {m.lora_canonical_name: (m.lora_config.rank, m.lora_config.alpha) for m in adapted(asdict(settings))}
    own = configs_of(settings, expected)
    assert found == {name: (own[name].rank, own[name].alpha) for name in expected}


@pytest.mark.parametrize("said", ["qkv_linear.wq", "layers.*.attention.qkv_linear.wq", "wq"])
def test_torchtitan_03s_own_names_are_names_as_well(said: str) -> None:
    assert [m.lora_canonical_name for m in adapted({"target_modules": [said]})] == NAMES[:-1][::7]
    with pytest.raises(ValueError, match="'wkv' matches no linear of the model; the linears are wq, wk, wv, wo"):
        adapted({"target_modules": ["wkv"]})


def adapted(settings: dict[str, Any]) -> list[Any]:
    """The adapted modules of a model of torchtitan 0.3."""
    spec = spec_of("llama3")
    unfuse_qkv(spec.model)
    with torch.device("meta"):
        model = spec.model.build()
    return list(apply_lora(model, in_own_names(LoRAConfig(**settings), model, canonical_name), **NAMED))


GROUPS = [ParamGroupConfig(pattern=pattern, optimizer_name="AdamW") for pattern in ("lora_b", ".*")]
NAMED: dict[str, Any] = {"canonical_name": canonical_name, "factor_class": TitanFactor}


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"new_tokens": ["<x>"]}, {}, "lora.new_tokens = .* torchtitan 0.2.2"),
        ({"loss_chunk_tokens": 64}, {}, "lora.loss_chunk_tokens = 64: .*num_chunks"),
        ({"train_also": ["norm"]}, {"training__dtype": "bfloat16"}, "lora.train_also with training.dtype"),
        (
            {"dropout": 0.1},
            {"activation_checkpoint": FullAC.Config(preserve_rng_state=False)},
            "would draw other masks",
        ),
        ({"base_format": "nf4"}, {"checkpoint__enable": False}, "nothing is loaded with checkpoint.enable = false"),
        ({}, {"optimizer__param_groups": GROUPS}, "Leave one, of pattern"),
    ],
)
def test_what_does_not_work_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        train(config(tmp_path, settings, **options))


def test_frozen_weights_are_bf16_and_the_numbers_those_of_casting_at_every_use(dcp_base: Path, tmp_path: Path) -> None:
    base = {"checkpoint__initial_load_path": str(dcp_base), "training__mixed_precision_param": "bfloat16"}
    losses = []
    for kept in (store_in_compute_dtype, lambda params, training: None):
        with mock.patch("lora_converter.titan03.model.store_in_compute_dtype", kept):
            run = train(config(tmp_path / str(len(losses)), training__steps=2, **base))
        losses.append(run.losses)
        dtypes = {param.requires_grad: param.dtype for param in run.trainer.model_parts[0].parameters()}
        assert dtypes == {True: torch.float32, False: torch.float32 if len(losses) == 2 else torch.bfloat16}
    assert losses[0] == losses[1]


def test_packed_weights_are_packed_and_a_flop_is_not_counted_twice(dcp_base: Path, tmp_path: Path) -> None:
    base = {"checkpoint__initial_load_path": str(dcp_base), "training__steps": 1}
    plain, packed, host = (
        train(made)
        for made in (
            config(tmp_path / "a", **base),
            config(tmp_path / "b", {"base_format": "nf4"}, **base),
            host_config(tmp_path / "c", **base),
        )
    )
    assert len(packed_formats(packed.trainer.model_parts[0])) == 28
    assert packed.losses[0] == pytest.approx(plain.losses[0], rel=1e-2) and packed.losses != plain.losses
    flops = [run.trainer.metrics_processor.num_flops_per_token for run in (plain, packed, host)]
    model = plain.trainer.model_parts[0]
    products = sum(p.numel() for n, p in model.named_parameters() if "tok_emb" not in n and not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops[0] == flops[1] == flops[2] - 2 * products + 6 * trained


def test_selective_checkpointing_keeps_what_it_keeps_of_the_plain_model(tmp_path: Path) -> None:
    """Of four layers' seven products each every second one is computed anew, with adapters as without."""
    counts = []
    for asks in (selective_ac.ask_about_products, lambda model: None):
        with mock.patch("lora_converter.titan03.trainer.ask_about_products", asks):
            folder = tmp_path / str(len(counts))
            run = jobs03.build(config(folder, training__steps=1, activation_checkpoint=SelectiveAC.Config()))
        with mock.patch("lora_converter.ops.sum_of_products", side_effect=ops.sum_of_products) as products:
            finish(run)
        counts.append(sum("bias" in call.kwargs for call in products.call_args_list))  # of forwards
    assert counts == [28 + 12, 28 + 28]


def test_a_tied_head_trains_in_full_by_either_name(tmp_path: Path) -> None:
    """And is saved and resumed, though torch knows it by one of them alone."""
    losses = []
    for name in ("lm_head", "output", "tok_embeddings"):
        plain = host_config(tmp_path / name, checkpoint__interval=1, training__steps=3)
        plain.model_spec.model.enable_weight_tying = True
        job = lora(plain, rank=4, train_also=[name])
        whole = train(copy.deepcopy(job)).losses
        shutil.rmtree(tmp_path / name / "checkpoint" / "step-3")
        assert train(job).losses == whole[2:]
        losses.append(whole)
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < losses[0][0]
