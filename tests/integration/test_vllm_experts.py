"""What vLLM makes of our directories with adapters on experts, by the rules of its source, restated here.

vLLM 0.33.0 (commit 4ba787ec9), `vllm/lora/`: `worker_manager.py` (`_load_adapter`: which modules are expected),
`lora_model.py` (`from_local_checkpoint`, `check_unexpected_modules`), `peft_helper.py` (`get_rank_and_scaling`,
`validate_legal`), `lora_weights.py` (`pack_moe`), `model_manager.py` (`_validate_moe_lora_format`,
`_stack_moe_lora_weights`, `_convert_3d_to_2d_moe_lora`) and `layers/fused_moe.py` (`set_lora`).

    2D   qwen3_moe, deepseek_v3, llama4: every layer's experts.<e>.{gate,up,down}_proj, all or none, as linears
    3D   gpt_oss (`is_3d_moe_weight`): experts.base_layer is gate and up, experts is down; both or none

What comes out is compared with PEFT's own merge into transformers' model.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import build
from hf_models import HF_MODELS
from hf_tiny import save_gpt_oss, tiny_gpt_oss
from peft import PeftModel
from safetensors.torch import load_file
from test_experts_in_peft import SELECTIONS, fill_b, trained
from test_experts_in_peft import pytestmark as pytestmark
from torch.testing import assert_close
from transformers import PreTrainedModel

from lora_converter import adapter_parameters

EXPERTS, HIDDEN, INNER = 4, 64, 48
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
LINEARS |= {"gate_proj", "up_proj", "down_proj"}  # dense layers' and shared experts'

Update = tuple[torch.Tensor, torch.Tensor]
"""What is added to w13 (experts, 2 inner, hidden), the gate's rows first, and to w2 (experts, hidden, inner)."""


@dataclass
class Engine:
    """vLLM with one model: its loading of an adapter, as far as experts go.

    Attributes:
        is_3d: `is_3d_moe_weight` of the model's class.
        interleaved: GptOssForCausalLM: rows of w13 are gate and up in turn.
        mixed: `--enable-mixed-moe-lora-format`, and `is_3d_lora_weight` on the request.
        max_rank: `--max-lora-rank`.
    """

    is_3d: bool = False
    interleaved: bool = False
    mixed: bool = False
    max_rank: int = 16
    inner: int = INNER

    def load(self, folder: Path) -> dict[str, Update]:
        """Experts module -> what it adds."""
        config = json.loads((folder / "adapter_config.json").read_text())
        needed = max([config["r"], *config.get("rank_pattern", {}).values()])
        if needed > self.max_rank:
            raise ValueError(f"LoRA rank {needed} is greater than max_lora_rank {self.max_rank}.")
        tensors = load_file(folder / "adapter_model.safetensors")
        self.check_names(tensors)
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, letter = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
            modules.setdefault(name, {})[letter] = value
        for name, pair in modules.items():
            pair["B"] = pair["B"] * scaling(config, name)
        owners = dict.fromkeys(m[0] for name in modules if (m := re.match(r".+\.experts(?=\.|$)", name)))
        return {owner: self.stacked(owner, modules) for owner in owners}

    def check_names(self, keys: dict[str, torch.Tensor]) -> None:
        of_experts = {f"experts.{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")}
        expected = LINEARS | {"experts"} | (of_experts if not self.is_3d else set())
        for key in keys:
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            if "base_layer" in key:
                continue
            at = name.find(".experts")
            assert (name[at + 1 :] if at >= 0 else name.rpartition(".")[2]) in expected, key

    def stacked(self, owner: str, modules: dict[str, dict[str, torch.Tensor]]) -> Update:
        if owner in modules:
            if not self.is_3d and not self.mixed:
                raise ValueError("contains fused 3D MoE weights, but the model uses a 2D MoE LoRA wrapper")
            w13, w2 = modules.get(f"{owner}.base_layer"), modules[owner]
            assert w13 is not None, "no gate_up_proj"
            pairs = [split(pair) for pair in (w13, w2)]
            shapes = ((HIDDEN, 2 * self.inner), (self.inner, HIDDEN))
            for (a, b), shape in zip(pairs, shapes, strict=True):
                if (a.shape[2], b.shape[1]) != shape:
                    raise ValueError(f"factors over {a.shape[2]} and {b.shape[1]} in room for {shape}")
            up, down = (b @ a for a, b in pairs)
            return (torch.cat([up[:, 0::2], up[:, 1::2]], 1) if self.interleaved else up), down
        products = []
        for product in ("gate", "up", "down"):
            pairs = [modules[f"{owner}.{e}.{product}_proj"] for e in range(EXPERTS)]  # all, or a KeyError
            assert len({pair["A"].shape[0] for pair in pairs}) == 1
            products.append(torch.stack([pair["B"] @ pair["A"] for pair in pairs]))
        return torch.cat(products[:2], 1), products[2]


def scaling(config: dict, name: str) -> float:
    """Of the first keys of `rank_pattern` and `alpha_pattern` that match the module's name, or a stack's."""
    if name.endswith(".experts.base_layer"):
        name = name.removesuffix("base_layer") + "gate_up_proj"
    elif name.endswith(".experts"):
        name += ".down_proj"

    def first(table: str, default: float) -> float:
        found = (v for k, v in config.get(table, {}).items() if re.match(rf"(.*\.)?({k})$", name))
        return next(found, default)

    rank, alpha = first("rank_pattern", config["r"]), first("alpha_pattern", config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def split(pair: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (experts, rank, in), B (experts, out, rank) of a stack's two-dimensional factors."""
    a, b = pair["A"], pair["B"]
    return a.reshape(EXPERTS, -1, a.shape[-1]), b.reshape(b.shape[0], -1, EXPERTS).permute(2, 0, 1)


def peft_update(model: PreTrainedModel, folder: Path, owner: str) -> Update:
    """The same by PEFT, of a model whose stacks are (experts, out, in) or, gpt-oss's, (experts, in, out)."""
    names = [f"{owner}.{stack}" for stack in ("gate_up_proj", "down_proj")]
    before = [model.state_dict()[name].clone() for name in names]
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    up, down = (merged[name] - value for name, value in zip(names, before, strict=True))
    if up.shape[1] == HIDDEN:
        up, down = up.mT, down.mT
        up = torch.cat([up[:, 0::2], up[:, 1::2]], 1)
    return up, down


@pytest.mark.parametrize("selection", list(SELECTIONS))
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_vllm_adds_to_experts_what_peft_adds(name: str, selection: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path, *SELECTIONS[selection])
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    run.trainer.close()
    found = Engine().load(tmp_path / "peft")
    assert len(found) == (1 if "layer" in selection and "own" not in selection else 3 - (name == "deepseek_v3"))
    for owner, update in found.items():
        for ours, theirs in zip(update, peft_update(HF_MODELS[name].make(), tmp_path / "peft", owner), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # theirs is a difference of weights
        assert any(each.abs().max() > 0.1 for each in update)


def gpt_oss(folder: Path, *options: str) -> Path:
    source = save_gpt_oss(tiny_gpt_oss(), folder / "base")
    job = ["--model.name=gpt_oss", "--model.flavor=hf_tiny", "--checkpoint.initial_load_in_hf"]
    run = build(folder / "run", *job, f"--checkpoint.initial_load_path={source}", *options)
    run.trainer.checkpointer.load()
    fill_b(adapter_parameters(run.trainer.model_parts[0]))
    run.trainer.checkpointer.run.write_peft(str(folder / "peft"))
    run.trainer.close()
    return folder / "peft"


@pytest.mark.parametrize("options", [[], ["--lora.expert_rank=3"], ["--lora.expert_rank=3", "--lora.use_rslora"]])
def test_vllm_adds_to_gpt_oss_what_peft_adds(options: list[str], tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path, "--lora.target_modules=all-linear,experts", *options)
    found = Engine(is_3d=True, interleaved=True).load(folder)
    assert len(found) == 2
    for owner, update in found.items():
        for ours, theirs in zip(update, peft_update(tiny_gpt_oss(), folder, owner), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert ours.abs().max() > 0.1


def test_vllm_takes_both_stacks_of_gpt_oss_or_none(tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path, "--lora.target_modules=*.experts.mlp1_weight")
    with pytest.raises(AssertionError, match="no gate_up_proj"):
        Engine(is_3d=True, interleaved=True).load(folder)


def test_vllm_refuses_llama4s_stacks_and_the_export_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's factors of them go over outputs where vLLM's go over inputs: even its conversion has no room for them."""
    run = trained("llama4", tmp_path, *SELECTIONS["experts alone"])
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    inner = run.trainer.model_parts[0].layers["0"].moe.experts.w1.shape[1]
    run.trainer.close()
    assert "vLLM 0.33 takes no adapters on them" in caplog.text
    with pytest.raises(ValueError, match="2D MoE LoRA wrapper"):
        Engine(inner=inner).load(tmp_path / "peft")
    with pytest.raises(ValueError, match="in room for"):
        Engine(mixed=True, max_rank=32, inner=inner).load(tmp_path / "peft")


def test_vllm_counts_the_stacked_rank_where_a_pattern_names_it(tmp_path: Path) -> None:
    """Experts of rank 6 beside linears of rank 4 need room for 12."""
    run = trained("qwen3_moe", tmp_path, "--lora.target_modules=all-linear,experts", "--lora.expert_rank=6")
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    run.trainer.close()
    with pytest.raises(ValueError, match="LoRA rank 12 is greater than max_lora_rank 8"):
        Engine(max_rank=8).load(tmp_path / "peft")
    Engine(max_rank=16).load(tmp_path / "peft")
