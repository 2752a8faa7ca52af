"""Bases and adapters from elsewhere, through the trainer and the command: folders, names, copies, patterns, numbers."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, adapter_state, build, finish, full_state, parse, train
from hf_models import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_converter.cli import main
from lora_converter.inspect import describe_adapter
from lora_converter.merge import merge_directories
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, load_peft

TOKENS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))


def on(base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def peft_adapter(
    folder: Path, base: Path, *, model: LlamaForCausalLM | None = None, save_embeddings: bool = False, **options: Any
) -> torch.Tensor:
    """An adapter that PEFT made and saved, and the logits with it."""
    model = model or tiny_llama()
    model.name_or_path = str(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for number, (name, param) in enumerate(model.named_parameters()):
            if "lora_" in name:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(
        folder, save_embedding_layers=save_embeddings or "lm_head" in options.get("target_modules", ())
    )
    return logits(model)


# A base folder is what its index says


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A base in shards, with what lies about in downloaded folders."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base, max_shard_size="300KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    return base


def litter(base: Path) -> None:
    for name in ("model-00009-of-00009.safetensors", "consolidated.safetensors", WEIGHTS_FILE):
        save_file({"model.norm.weight": torch.full((64,), 7.0), "stray": torch.ones(2)}, base / name)
    (base / CONFIG_FILE).write_text("{}")
    for name in ("model.gguf", "flax_model.msgpack", "model.onnx", "tf_model.h5", "pytorch_model.bin", "x.pt", "y.pth"):
        (base / name).write_bytes(b"not read")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_mine.py", "LICENSE"):
        (base / name).write_text("{}")
    for name in (
        "original/params.json",
        "deep/er/code.py",
        "original/tok.model",
        ".git/HEAD",
        ".cache/x",
        "onnx/m.onnx",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("x")


def test_a_job_reads_the_files_of_the_index_alone(
    sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = build(tmp_path / "clean", *on(sharded))
    clean.trainer.checkpointer.load()
    litter(sharded)
    run = build(tmp_path / "run", *on(sharded))
    run.trainer.checkpointer.load()
    expected, found = full_state(clean), full_state(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "not part of the model, and left out: adapter_model.safetensors, consolidated.safetensors" in caplog.text
    for one in (clean, run):
        one.trainer.close()


def test_a_shard_that_is_missing_is_named_by_the_job_and_by_the_merge(sharded: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", sharded)
    lost = sorted(sharded.glob("model-*.safetensors"))[-1]
    assert not any("q_proj" in key for key in load_file(lost))  # no target is in it
    lost.unlink()
    run = build(tmp_path / "run", *on(sharded))
    with pytest.raises(ValueError, match=f"is not complete: {lost.name} of model.safetensors.index.json is missing"):
        run.trainer.checkpointer.load()
    run.trainer.close()
    with pytest.raises(ValueError, match=f"is not complete: {lost.name}"):
        merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "which is not in its folder"),
        ({"weight_map": ["a"]}, "is damaged: its weight_map is no table"),
        ({}, "is damaged: its weight_map is no table"),
    ],
)
def test_an_index_that_is_none_is_refused(index: dict, message: str, sharded: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")


def test_a_merged_folder_has_all_that_loading_needs_and_no_other_weights(
    sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = peft_adapter(tmp_path / "adapter", sharded)
    litter(sharded)
    merge_directories(sharded, tmp_path / "adapter", tmp_path / "merged")
    found = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    shards = {path.name for path in sharded.glob("model-*-of-0000[!9].safetensors")}
    assert found == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "lora_merge.json", "tokenizer.json",
        "chat_template.jinja", "modeling_mine.py", "LICENSE", "original/params.json", "deep/er/code.py",
        "original/tok.model",
    }  # fmt: skip
    told = next(text for text in caplog.messages if text.startswith("Not copied into the merged model"))
    for name in (".cache/", ".git/", "adapter_config.json", "consolidated.safetensors", "model.gguf", "onnx/m.onnx"):
        assert name in told
    (tmp_path / "merged" / "generation_config.json").unlink()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


# Numbers


def test_what_does_not_fit_into_the_dtype_is_not_merged(hf_base: Path, tmp_path: Path, capsys: Any) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    tensors[next(key for key in tensors if "lora_B" in key)] += 1e6
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    command = [
        "merge",
        "--base",
        str(hf_base),
        "--adapter",
        str(tmp_path / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--dtype", "float16"]) == 1
    error = capsys.readouterr().err
    assert "q_proj.weight does not fit into float16: of " in error and "Name a wider --dtype" in error
    assert str(tmp_path / "adapter") in error and str(hf_base) in error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--dtype", "bfloat16"]) == 0


def test_factors_that_hold_nan_are_not_merged(hf_base: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"the factors of .*q_proj hold nan or inf"):
        merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_than_the_adapter_names_is_warned_of_once(
    hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft_adapter(tmp_path / "adapter", Path("meta-llama/Llama-9"))
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    assert caplog.text.count("was made for the base 'meta-llama/Llama-9', and is merged into") == 1
    shutil.copytree(hf_base, tmp_path / "llama-9")
    caplog.clear()
    merge_directories(tmp_path / "llama-9", tmp_path / "adapter", tmp_path / "again")
    assert "was made for the base" not in caplog.text


def test_a_merge_at_the_end_that_fails_is_tried_once(hf_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_converter.run import run as lora_run

    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(lora_run, "merge_directories", fail)
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--lora.save_merged"]
    run = build(tmp_path, *on(hf_base), *end)
    with pytest.raises(OSError, match="no space"):
        finish(run)
    run.trainer.checkpointer.close()
    run.trainer.checkpointer.__del__()
    assert len(calls) == 1


def test_adapters_train_in_fp32_where_the_model_is_in_bf16(hf_base: Path, tmp_path: Path) -> None:
    options = [
        *on(hf_base),
        "--training.dtype=bfloat16",
        "--training.mixed_precision_param=bfloat16",
        "--optimizer.lr=2e-5",
    ]
    run = build(tmp_path, *options, "--checkpoint.interval=2")
    before = {name: value for name, value in adapter_state(run).items() if "lora_a" in name}
    finish(run)
    after = adapter_state(run)
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] != value).flatten() for name, value in before.items()]).float().mean()
    assert moved > 0.9  # in bf16 5 to 9 %
    states = run.trainer.optimizers.optimizers[0].state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


def test_steps_that_older_versions_saved_in_bf16_still_resume(hf_base: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run = train(tmp_path, *on(hf_base), "--training.steps=2", "--checkpoint.interval=2")
    step = tmp_path / "checkpoint" / "step-2"
    kept = (step / "lora.json").read_bytes()
    states = run.trainer.checkpointer.run.host.states
    adapters = {name: value.bfloat16() for name, value in adapter_state(run).items()}
    optimizer = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in states["optimizer"].state_dict().items()
    }
    shutil.rmtree(step)
    dcp.save({**states, "optimizer": optimizer, **adapters}, checkpoint_id=step)
    (step / "lora.json").write_bytes(kept)
    again = build(tmp_path, *on(hf_base), "--training.steps=3")
    finish(again)
    assert len(again.losses) == 1 and {v.dtype for v in adapter_state(again).values()} == {torch.float32}


# Adapters that bring more than factors, or other names


@pytest.mark.parametrize("changed", [False, True])
def test_copies_of_base_weights_are_dropped_where_they_are_the_bases_and_else_refused_in_training(
    changed: bool, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = AutoModelForCausalLM.from_pretrained(hf_base, dtype=torch.float32, attn_implementation="eager")
    if changed:
        with torch.no_grad():
            model.lm_head.weight[3] += 1.0
    expected = peft_adapter(tmp_path / "adapter", hf_base, model=model, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    start = [*on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter"]
    run = build(tmp_path / "run", *start, "--lora.rank=16")
    if changed:
        with pytest.raises(ValueError, match=r"brings output\.weight of another base than this one.*Merge it first"):
            run.trainer.checkpointer.load()
    else:
        run.trainer.checkpointer.load()
        with torch.no_grad():
            found = run.trainer.model_parts[0].eval()(TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert "output.weight of" in caplog.text and "are the base's own, and dropped" in caplog.text
    run.trainer.close()
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers", "layers"])
def test_an_adapter_of_a_larger_model_or_a_smaller_one_is_read(prefix: str, hf_base: Path, tmp_path: Path) -> None:
    expected = peft_adapter(tmp_path / "adapter", hf_base)
    renamed(tmp_path / "adapter", "base_model.model.model.layers", f"base_model.model.{prefix}")
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    run = build(tmp_path / "run", *on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter", "--lora.rank=16")
    run.trainer.checkpointer.load()
    with torch.no_grad():
        found = run.trainer.model_parts[0].eval()(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    run.trainer.close()


def test_a_part_that_the_base_has_not_is_not_taken_for_another(hf_base: Path, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "adapter", hf_base)
    renamed(tmp_path / "adapter", "base_model.model.model.layers", "base_model.model.vision_tower.layers")
    with pytest.raises(ValueError, match=r"vision_tower\.layers\.0\.self_attn\.q_proj\.weight is not in the base"):
        merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")


def test_a_name_that_may_be_several_is_an_error_with_the_candidates(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weights = {f"{part}.layers.0.q_proj.weight": torch.zeros(4, 4) for part in ("model", "text_model")}
    save_file(weights, base / "model.safetensors")
    from lora_converter.peft import PeftAdapter, save_peft

    factors = {"transformer.layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))}
    save_peft(PeftAdapter(factors, 1, 1.0, 0.0, False, ["q_proj"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"may be any of model\.layers\.0\.q_proj, text_model\.layers\.0\.q_proj"):
        merge_directories(base, tmp_path / "adapter", tmp_path / "merged")


# Ranks and alphas of single linears, through the trainer


PATTERNS = '[lora.rank_pattern]\n"attention.wq" = 6\n"layers.1.*" = 3\n[lora.alpha_pattern]\n"w2" = 5.0\n'


def patterned(tmp_path: Path, text: str = PATTERNS) -> Path:
    config = tmp_path / f"patterns-{len(list(tmp_path.glob('patterns-*')))}.toml"
    config.write_text((ROOT / "configs" / "debug_lora.toml").read_text() + "\n" + text)
    return config


def test_patterns_train_resume_export_import_and_merge(hf_base: Path, tmp_path: Path) -> None:
    text = PATTERNS.replace('"attention.wq"', '"layers.[023].attention.wq"')
    config = patterned(tmp_path, text)
    options = [*on(hf_base), "--checkpoint.interval=2", "--lora.rank=4"]
    whole = train(tmp_path / "whole", *options, "--training.steps=4", config=config)
    ranks = {name: value.shape[0] for name, value in adapter_state(whole).items() if "lora_a" in name}
    assert ranks["layers.0.attention.wq.lora_a.weight"] == 6 and ranks["layers.1.attention.wq.lora_a.weight"] == 3
    assert ranks["layers.2.feed_forward.w2.lora_a.weight"] == 4
    train(tmp_path / "parts", *options, "--training.steps=2", "--lr_scheduler.total_steps=4", config=config)
    second = build(tmp_path / "parts", *options, "--training.steps=4", config=config)
    finish(second)
    assert len(second.losses) == 2
    other = build(
        tmp_path / "parts", *options, "--training.steps=6", config=patterned(tmp_path, text.replace("5.0", "6.0"))
    )
    with pytest.raises(ValueError, match=r"lora\.alpha of layers\.0\.feed_forward\.w2 is 5\.0 there and 6\.0 here"):
        other.trainer.checkpointer.load()
    other.trainer.close()
    run = build(tmp_path / "whole", *options, "--training.steps=4", config=config)
    run.trainer.checkpointer.load()
    run.trainer.checkpointer.run.write_peft(str(tmp_path / "peft"))
    with torch.no_grad():
        expected = run.trainer.model_parts[0].eval()(TOKENS)
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-4, atol=1e-4)
    adapter = load_peft(tmp_path / "peft")
    assert (
        adapter.rank_of("model.layers.0.self_attn.q_proj") == 6
        and adapter.alpha_of("model.layers.3.mlp.down_proj") == 5
    )
    told = describe_adapter(adapter).splitlines()[0]
    assert told.startswith("rank 3 to 6, alpha 5 to ") and "scaling 1.25 to " in told
    start = build(tmp_path / "next", *on(hf_base), f"--lora.initial_adapter_path={tmp_path}/peft", "--lora.rank=16")
    start.trainer.checkpointer.load()
    trained, started = adapter_state(run), adapter_state(start)
    assert all(torch.equal(trained[name], started[name]) for name in trained)
    merge_directories(hf_base, tmp_path / "peft", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (
        main(["export", "--checkpoint", str(tmp_path / "whole/checkpoint/step-4"), "--output", str(tmp_path / "x")])
        == 0
    )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    for one in (run, start):
        one.trainer.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('rank = "8"', "lora.rank = '8': must be an integer of at least 1."),
        ("rank = 8.0", "lora.rank = 8.0: must be an integer of at least 1."),
        ("rank = 0", "lora.rank = 0: must be an integer of at least 1."),
        ("rank = -4", "lora.rank = -4: must be an integer of at least 1."),
        ("rank = true", "lora.rank = True: must be an integer of at least 1."),
        ('alpha = "32"', "lora.alpha = '32': must be a finite number above 0."),
        ("alpha = nan", "lora.alpha = nan: must be a finite number above 0."),
        ("alpha = 0", "lora.alpha = 0: must be a finite number above 0."),
        ("alpha = -1.0", "lora.alpha = -1.0: must be a finite number above 0."),
        ("dropout = 1.0", "lora.dropout = 1.0: must be at least 0 and below 1."),
        ('dropout = "0.1"', "lora.dropout = '0.1': must be at least 0 and below 1."),
        ('use_rslora = "false"', "lora.use_rslora = 'false': must be true or false."),
        ("target_modules = 4", "lora.target_modules = 4: must be a list of non-empty strings."),
        ('target_modules = "wq"', "lora.target_modules = 'wq': must be a list of non-empty strings."),
        ("target_modules = []", "lora.target_modules is empty: name at least one linear, or use 'all-linear'."),
        ("exclude_modules = 1", "lora.exclude_modules = 1: must be a list of non-empty strings."),
        ('rank_pattern = {wq = "8"}', "lora.rank_pattern['wq'] = '8': must be an integer of at least 1."),
        ("alpha_pattern = 3", "lora.alpha_pattern = 3: must be a table from patterns to numbers."),
        ("initial_adapter_path = 3", "lora.initial_adapter_path = 3: must be a string."),
        ('save_merged = "true"', "lora.save_merged = 'true': must be true or false."),
        ("rnak = 8", "rnak"),
    ],
)
def test_a_wrong_value_in_the_file_is_named_with_what_is_allowed(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text(f'[job]\ncustom_config_module = "lora_converter.titan"\n[lora]\n{text}\n')
    from torchtitan.config import ConfigManager

    with pytest.raises((ValueError, TypeError, SystemExit)) as error:
        ConfigManager().parse_args(["--job.config_file", str(config)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj", "'q_proj' matches no linear of the model; the linears are wq, wk, wv, wo, w1, w2, w3, output."),
        (r".*\.w[qk]$", "Patterns are names, dotted suffixes and globs, not regular expressions."),
    ],
)
def test_names_of_hugging_face_and_regular_expressions_are_no_targets(
    target: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        build(tmp_path, "--checkpoint.initial_load_path=", f"--lora.target_modules={target}")
    assert message in str(error.value)


def test_patterns_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    assert parse(tmp_path, "--lora.rank_pattern", "wq", "8", "w2", "2").lora.rank_pattern == {"wq": 8, "w2": 2}


# Models that the user's own module registers


@pytest.mark.slow
def test_a_step_of_a_model_that_a_module_of_the_users_registers_is_exported(hf_base: Path, tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torchtitan.models.llama3 import TransformerModelArgs, llama3_args\n"
        "llama3_args['mine'] = TransformerModelArgs(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=320,\n"
        "                                           multiple_of=96, rope_theta=500000)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        train(tmp_path / "run", *on(hf_base), "--model.flavor=mine", "--experimental.custom_import=my_models")
    finally:
        sys.path.remove(str(tmp_path))
    step = tmp_path / "run" / "checkpoint" / "step-3"
    described = json.loads((step / "lora.json").read_text())
    assert described["custom_import"] == "my_models"
    command = [str(Path(sys.executable).with_name("lora-converter")), "export", "--checkpoint", str(step), "--output"]
    env = dict(os.environ)

    def export(name: str, *more: str, path: str = "") -> subprocess.CompletedProcess[str]:
        here = {**env, "PYTHONPATH": path} if path else env
        return subprocess.run(
            [*command, str(tmp_path / name), *more], cwd=tmp_path, env=here, capture_output=True, text=True
        )

    recorded = export("recorded", path=str(tmp_path))
    assert recorded.returncode == 0 and "Importing my_models, which registers llama3 mine" in recorded.stderr
    lost = export("lost")
    assert lost.returncode == 1 and "my_models cannot be imported" in lost.stderr and "--import" in lost.stderr
    named = export("named", "--import", "my_models")
    assert named.returncode == 0, named.stderr
    del described["custom_import"]
    (step / "lora.json").write_text(json.dumps(described))
    unknown = export("unknown")
    assert unknown.returncode == 1 and "has no model 'llama3' 'mine'. If a module of yours" in unknown.stderr
