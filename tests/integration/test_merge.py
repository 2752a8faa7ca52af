"""Merged weights against PEFT's own merge, in plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import HF_MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_converter.cli import main
from lora_converter.peft import load_peft

TOKENS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama3", "qwen3"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """base/, in shards and with a tokenizer file, and adapter/, made by PEFT with rsLoRA."""
    model = HF_MODELS[request.param].make()
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    config = LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj", "lm_head"])
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path


def merge(folders: Path, *options: str) -> Path:
    arguments = ["--base", f"{folders}/base", "--adapter", f"{folders}/adapter", "--output", f"{folders}/merged"]
    assert main(["merge", *arguments, *options]) == 0
    return folders / "merged"


def test_the_merged_model_is_base_plus_adapter_and_pefts_own_merge(folders: Path) -> None:
    output = merge(folders)
    base = AutoModelForCausalLM.from_pretrained(folders / "base", attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, folders / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager").eval()
    with torch.no_grad():
        # fp32: two products in sequence against one of their sum.
        torch.testing.assert_close(merged(TOKENS).logits, peft(TOKENS).logits, rtol=1e-5, atol=1e-5)
        expected = peft.merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_shards_index_and_other_files_are_the_bases(folders: Path) -> None:
    output = merge(folders)
    names = {path.name for path in (folders / "base").iterdir()}
    assert {path.name for path in output.iterdir()} == {*names, "lora_merge.json"} and len(names) > 5
    assert (output / "tokenizer_config.json").read_text() == "{}"
    index = "model.safetensors.index.json"
    assert (output / index).read_bytes() == (folders / "base" / index).read_bytes()
    for shard in (folders / "base").glob("*.safetensors"):
        before, after = load_file(shard), load_file(output / shard.name)
        assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
        untouched = [k for k in before if "norm" in k or "v_proj" in k]
        assert all(torch.equal(before[k], after[k]) for k in untouched)


def test_a_bf16_base_merges_to_the_rounded_fp32_result(folders: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / "base").bfloat16()
    model.save_pretrained(folders / "base", max_shard_size="200KB")
    exact = PeftModel.from_pretrained(model.float(), folders / "adapter").merge_and_unload().state_dict()
    merged: dict[str, torch.Tensor] = {}
    for shard in merge(folders).glob("*.safetensors"):
        merged.update(load_file(shard))
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    for name, value in merged.items():
        # One unit in the last place where fp32's own rounding decides a tie.
        torch.testing.assert_close(value.float(), exact[name].bfloat16().float(), rtol=2**-8, atol=0)
        assert (value == exact[name].bfloat16()).float().mean() > 0.999


def test_dtype_is_written_to_weights_and_config(folders: Path) -> None:
    output = merge(folders, "--dtype", "bfloat16")
    config = json.loads((output / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_inspect_tells_what_was_merged_and_which_weights_moved(folders: Path, capsys) -> None:
    output = merge(folders)
    shards = [load_file(path) for path in output.glob("*.safetensors")]
    total = sum(len(shard) for shard in shards)
    moved = len(load_peft(folders / "adapter").factors)
    capsys.readouterr()
    assert main(["inspect", str(output), "--base", str(folders / "base")]) == 0
    shown = capsys.readouterr().out.replace(str(folders), "F")
    assert shown.startswith(
        "rank 5, alpha 7, scaling 3.1305\ntargets: down_proj, k_proj, lm_head, q_proj\n"
        "adapter: F/adapter\nbase: F/base\n"
    )
    assert f"\n{total} weights, " in shown and f"\n{total - moved} weights equal the base's\n" in shown
    assert shown.count("% of |weight|") == moved
    assert main(["inspect", str(folders / "adapter"), "--base", str(folders / "base")]) == 0
    of_adapter = {line.split("  ")[0]: line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[5:]}
    of_merged = {line.split("  ")[0]: line.split("  ")[-1] for line in shown.splitlines() if "% of" in line}
    assert {name.removesuffix(".weight"): beside for name, beside in of_merged.items()} == of_adapter


def test_inspect_flags_weights_that_are_not_finite(folders: Path, capsys) -> None:
    path = next((folders / "base").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].fill_(torch.nan)}, path, metadata={"format": "pt"})
    assert main(["inspect", str(folders / "base")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("no record of a merge\n") and shown.count("NOT FINITE") == 1
    assert shown.splitlines()[-1].startswith(f"{name}  ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_base_is_refused_and_its_other_tensors_survive_a_cast(
    folders: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(p for p in (folders / "base").glob("*.safetensors") if any("q_proj" in key for key in load_file(p)))
    tensors = load_file(path)
    adapted, other = (next(key for key in tensors if name in key) for name in ("q_proj.weight", "v_proj.weight"))
    save_file({**tensors, adapted: tensors[adapted].to(dtype)}, path, metadata={"format": "pt"})
    assert f"{adapted} is quantized" in refused(folders, capsys)
    save_file({**tensors, other: tensors[other].to(dtype)}, path, metadata={"format": "pt"})
    merged = load_file(merge(folders, "--dtype", "bfloat16") / path.name)
    assert merged[other].dtype is dtype and merged[adapted].dtype is torch.bfloat16


def test_inspect_names_a_weight_of_another_shape(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((folders / "base").glob("*.safetensors"))
    shutil.copytree(folders / "base", folders / "other")
    changed = {key: value[:1].clone() for key, value in load_file(path).items()}
    save_file(changed, folders / "other" / path.name, metadata={"format": "pt"})
    assert main(["inspect", str(folders / "base"), "--base", str(folders / "other")]) == 1
    assert " in F/base and (1,) in F/other" in capsys.readouterr().err.replace(str(folders), "F")


def refused(folders: Path, capsys: pytest.CaptureFixture[str], **other: Path) -> str:
    paths = {"base": folders / "base", "adapter": folders / "adapter", "output": folders / "merged", **other}
    assert main(["merge", *(f"--{name}={path}" for name, path in paths.items())]) == 1
    assert not list(folders.glob("*.incomplete"))
    return capsys.readouterr().err.replace(str(folders), "F")


def test_mistakes_are_named_and_nothing_is_written(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(folders, capsys, output=folders / "base").startswith("lora-converter: F/base exists already.")
    assert "F/adapter holds no .safetensors" not in refused(folders, capsys, base=folders / "nowhere")
    other = HF_MODELS["deepseek_v3"].make()
    other.save_pretrained(folders / "other")
    message = refused(folders, capsys, base=folders / "other")
    assert "model.layers.0.self_attn.q_proj.weight is not in the base" in message
    assert message.count("is not in the base") >= 6
    assert not (folders / "merged").exists()
