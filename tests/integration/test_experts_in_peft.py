"""Adapters on routed experts in PEFT and back, on transformers' own models.

Tried with PEFT 0.21.2 and transformers 5.23, which stack experts.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import Run, build, train
from hf_models import HF_MODELS, save_hf
from hf_tiny import save_gpt_oss, tiny_gpt_oss
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from torchtitan.models.attention import FlexAttentionWrapper
from transformers import PreTrainedModel

from lora_converter import adapter_parameters
from lora_converter.cli import main
from lora_converter.tensors import copy_full_

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
pytestmark = [
    # PEFT looks for the keys of its patterns among the modules that it adapts, and not among the parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    # It stacks the experts of all layers or of none: those without adapters get new ones, whose B is zero.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

MIXTURES = ["qwen3_moe", "deepseek_v3", "llama4"]


def job(name: str, folder: Path, *options: str) -> Run:
    """A run on a Hugging Face folder of a mixture, loaded."""
    base = folder / "base"
    if not base.exists():
        save_hf(name, base)
    here = [*HF_MODELS[name].options[:2], f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]
    run = build(folder / "run", *here, *options)
    run.trainer.checkpointer.load()
    run.trainer.model_parts[0].eval()
    return run


def trained(name: str, folder: Path, *options: str) -> Run:
    """The same with every B away from zero."""
    run = job(name, folder, *options)
    fill_b(adapter_parameters(run.trainer.model_parts[0]))
    return run


def fill_b(parameters: dict[str, torch.nn.Parameter]) -> None:
    for number, (key, param) in enumerate(parameters.items()):
        if key.endswith(("lora_b.weight", "_lora_b", "lora_B.default.weight")):
            generator = torch.Generator().manual_seed(number)
            copy_full_(param, torch.empty(param.shape).normal_(std=0.1, generator=generator))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, PreTrainedModel | PeftModel):
            return model.eval()(input_ids=TOKENS).logits
        return model.eval()(TOKENS)


SELECTIONS = {
    "all": ["--lora.target_modules=all-linear,experts"],
    "experts of another rank": ["--lora.target_modules=all-linear,experts", "--lora.expert_rank=3"],
    "rsLoRA": ["--lora.target_modules=all-linear,experts", "--lora.use_rslora"],
    "rsLoRA, another rank": [
        "--lora.target_modules=*.attention.*,experts",
        "--lora.use_rslora",
        "--lora.expert_rank=3",
    ],
    "experts alone": ["--lora.target_modules=experts"],
    "one product": ["--lora.target_modules=*.experts.w1"],
    "one layer": ["--lora.target_modules=*.attention.*,layers.1.moe.experts", "--lora.expert_rank=2"],
    "a layer of its own rank": [
        "--lora.target_modules=experts",
        "--lora.rank_pattern",
        "layers.1.moe.experts",
        "2",
    ],
}


@pytest.mark.parametrize("selection", list(SELECTIONS))
@pytest.mark.parametrize("name", MIXTURES)
def test_an_export_gives_peft_our_logits_and_comes_back(name: str, selection: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path, *SELECTIONS[selection])
    expected = logits(run.trainer.model_parts[0])
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    base = HF_MODELS[name].make()
    untouched = logits(base)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "peft"))
    assert (found - untouched).abs().max() > 1e-1
    assert_close(found, expected, rtol=1e-5, atol=HF_MODELS[name].atol * 3)  # larger logits than there
    run.trainer.close()
    again = job(
        name, tmp_path, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16", "--checkpoint.folder=again"
    )
    assert torch.equal(logits(again.trainer.model_parts[0]), expected)
    again.trainer.checkpointer.run.write_peft(str(tmp_path / "second"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    again.trainer.close()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_run_writes_both_forms_at_its_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merged model is PEFT's own merge, and what the run computes; the command line writes the same adapter."""
    base = save_hf(name, tmp_path / "base")
    options = [
        *HF_MODELS[name].options[:2],
        f"--checkpoint.initial_load_path={base}",
        "--checkpoint.initial_load_in_hf",
    ]
    options += ["--lora.target_modules=*.attention.*,experts", "--lora.expert_rank=3", "--optimizer.lr=0.02"]
    ends = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged"]
    run = train(tmp_path / "run", *options, *ends)
    adapter, steps = tmp_path / "run" / "checkpoint" / "step-3", tmp_path / "same" / "checkpoint" / "step-3"
    model = HF_MODELS[name].make()
    untouched = logits(model)
    merged = type(model).from_pretrained(tmp_path / "run" / "checkpoint" / "merged-3", attn_implementation="eager")
    expected = logits(run.trainer.model_parts[0])
    assert (expected - untouched).abs().max() > 1e-2
    assert_close(logits(merged), expected, rtol=1e-5, atol=HF_MODELS[name].atol * 3)
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        assert_close(value, theirs[key], rtol=1e-6, atol=1e-7)
    train(tmp_path / "same", *options)
    assert main(["export", "--checkpoint", str(steps), "--output", str(tmp_path / "peft")]) == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / file).read_bytes() == (adapter / file).read_bytes()


@pytest.mark.parametrize("name", MIXTURES)
def test_what_peft_trained_on_stacked_experts_is_taken(name: str, tmp_path: Path) -> None:
    """By `target_parameters`, as PEFT's own training of experts goes."""
    base = HF_MODELS[name].make()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    if name == "llama4":
        config.target_modules = r"language_model\..*\.[qo]_proj"
    twin = get_peft_model(base, config)
    fill_b(dict(twin.named_parameters()))
    expected = logits(twin)
    twin.save_pretrained(tmp_path / "peft")
    run = job(name, tmp_path, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    assert (run.trainer.checkpointer.run.config.rank, run.trainer.checkpointer.run.config.alpha) == (3, 5.0)
    assert_close(logits(run.trainer.model_parts[0]), expected, rtol=1e-5, atol=HF_MODELS[name].atol * 3)
    run.trainer.close()


@pytest.mark.parametrize("rslora", [False, True])
def test_products_of_several_ranks_and_scalings_are_taken(rslora: bool, tmp_path: Path) -> None:
    """PEFT's own: gate and up of rank 2 r as one stack, down of rank r, and with rsLoRA of another scaling."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    twin = get_peft_model(
        HF_MODELS["qwen3_moe"].make(), LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    )
    fill_b(dict(twin.named_parameters()))
    twin.save_pretrained(tmp_path / "peft")
    run = job("qwen3_moe", tmp_path, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    assert_close(logits(run.trainer.model_parts[0]), logits(twin), rtol=1e-5, atol=HF_MODELS["qwen3_moe"].atol * 3)
    state = dict(adapter_parameters(run.trainer.model_parts[0]))
    assert state["layers.0.attention.wq.lora_a.weight"].shape[0] == 3
    a, b = state["layers.0.moe.experts.w2_lora_a"], state["layers.0.moe.experts.w2_lora_b"]
    assert a.shape[2] == 6 and b[..., :3].all() and not b[..., 3:].any() and a[..., 3:].all()  # which can train
    run.trainer.close()


@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_narrow_dtype_has_no_room_for_is_refused_by_name(name: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path, "--lora.target_modules=experts", "--checkpoint.export_dtype=float16")
    state = dict(adapter_parameters(run.trainer.model_parts[0]))
    with torch.no_grad():
        state["layers.1.moe.experts.w3_lora_b"][2].fill_(1e6)
    with pytest.raises(ValueError, match=r"experts\..* would hold inf in torch\.float16\. Name a wider dtype"):
        run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    assert not (tmp_path / "peft").exists()
    run.trainer.close()


def test_adapters_on_some_experts_alone_are_taken(tmp_path: Path) -> None:
    """Their others begin as in a new adapter. A layer of zeros, which PEFT wants beside others, is no adapter."""
    run = trained("qwen3_moe", tmp_path, "--lora.target_modules=experts", "--lora.rank=3")
    for name, param in adapter_parameters(run.trainer.model_parts[0]).items():
        with torch.no_grad():
            param[1 if name.endswith("_b") else 4 :].zero_()
            param.mul_(name.split(".")[1] != "2")
    expected = logits(run.trainer.model_parts[0])
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    run.trainer.close()
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    kept = {key: value for key, value in weights.items() if ".experts.0." in key or ".layers.2." in key}
    save_file(kept, tmp_path / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
    run = job("qwen3_moe", tmp_path, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    assert torch.equal(logits(run.trainer.model_parts[0]), expected)
    state = dict(adapter_parameters(run.trainer.model_parts[0]))
    assert {name.split(".")[1] for name in state} == {"0", "1"}
    assert all(value.any(1).all() == name.endswith("_a") for name, value in state.items())
    run.trainer.close()


@pytest.mark.parametrize(("parameters", "rank"), [(["gate_up_proj"], 6), (["gate_up_proj", "down_proj"], 6)])
def test_a_stack_that_nothing_trained_yet_keeps_its_rank(parameters: list[str], rank: int, tmp_path: Path) -> None:
    twin = get_peft_model(
        HF_MODELS["qwen3_moe"].make(), LoraConfig(r=rank, target_parameters=[f"experts.{name}" for name in parameters])
    )
    twin.save_pretrained(tmp_path / "peft")
    run = job(
        "qwen3_moe", tmp_path, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16", "--lora.alpha=32"
    )
    state = dict(adapter_parameters(run.trainer.model_parts[0]))
    assert {value.shape[2] for value in state.values()} == {rank} and len(state) == 3 * 2 * (1 + len(parameters))
    run.trainer.close()


def test_what_does_not_fit_the_experts_is_said(tmp_path: Path) -> None:
    run = trained("qwen3_moe", tmp_path, "--lora.target_modules=experts", "--lora.rank=3")
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    run.trainer.close()
    start = [f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16"]
    says = r"2, but experts of the adapter in .* have 3\. Leave lora\.expert_rank out to take the adapter's\.$"
    with pytest.raises(ValueError, match=says):
        job("qwen3_moe", tmp_path, *start, "--lora.expert_rank=2")
    job("qwen3_moe", tmp_path, *start).trainer.close()
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({k: v[:, :40].contiguous() if "lora_A" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"experts\.\*\.gate_proj is \(48, 40\) there and \(48, 64\) in the model"):
        job("qwen3_moe", tmp_path, *start)


def test_gpt_oss_goes_to_peft_and_what_peft_trained_is_taken(tmp_path: Path) -> None:
    """Forwards alone: transformers' attention, and FlexAttention uncompiled, which returns what the sinks need."""
    source = save_gpt_oss(tiny_gpt_oss(), tmp_path / "base")
    options = ["--model.name=gpt_oss", "--model.flavor=hf_tiny", "--checkpoint.initial_load_in_hf"]
    options += [f"--checkpoint.initial_load_path={source}"]
    twin = get_peft_model(
        tiny_gpt_oss(), LoraConfig(r=5, lora_alpha=7, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    fill_b(dict(twin.named_parameters()))
    twin.save_pretrained(tmp_path / "peft")
    run = build(tmp_path / "run", *options, f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    model = run.trainer.model_parts[0].float().eval()
    run.trainer.checkpointer.load()
    masks = model.get_attention_masks(input_batch=TOKENS, tokenizer=run.trainer.tokenizer)
    with torch.no_grad(), mock.patch.object(FlexAttentionWrapper, "_compiled_flex_attn", flex_attention):
        actual = model(TOKENS, attention_masks=masks)
    assert (logits(twin) - logits(tiny_gpt_oss())).abs().max() > 1e-2
    assert_close(actual, logits(twin), rtol=1e-5, atol=1e-5)
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "again"))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt_oss(), tmp_path / "again")), logits(twin))
    run.trainer.close()
