"""Ranks and alphas by pattern, from the TOML file and the command line to PEFT and back."""

from pathlib import Path

import pytest
import torch
from harness import ROOT, adapter_state, build, finish, parse, train
from hf_tiny import tiny_llama
from peft import PeftModel
from test_foreign_folders import TOKENS, logits, on
from transformers import AutoModelForCausalLM

from lora_converter.cli import main
from lora_converter.inspect import describe_adapter
from lora_converter.merge import merge_directories
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, load_peft

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
