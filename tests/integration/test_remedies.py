"""Settings that are refused, and what the message says to do: done, the job trains on its base as it would have."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import BASE_CONFIG, TINY_ARGS, ConfigManager, Run, adapter_state, build, train
from hf_models import HF_MODELS, save_hf
from safetensors.torch import load_file, save_file
from test_resume import on, step

from lora_converter.cli import main

pytestmark = pytest.mark.slow

FLOAT8 = "--quantize.linear.float8.emulate"
PEFT_OUT = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
NO_BASE = ["--checkpoint.initial_load_path=", "--checkpoint.no-initial_load_in_hf"]
RECOMPUTED = ["--lora.dropout=0.5", "--activation_checkpoint.mode=full"]
STEPS = "--training.steps=2"
TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))

REMEDIES = {
    "lora after what quantizes": (
        ["--model.converters=lora,quantize.linear.float8", FLOAT8],
        "stands after \"lora\" and would quantize the adapters. Write ['quantize.linear.float8', 'lora'].",
        ["--model.converters=quantize.linear.float8,lora", FLOAT8],
    ),
    "lora once": (["--model.converters=lora,lora"], "Write ['lora'].", ["--model.converters=lora"]),
    "one of the linears that are named": (
        ["--lora.target_modules=wq,wkv"],
        "'wkv' matches no linear of the model; the linears are wq, wk, wv, wo, w1, w2, w3, output.",
        ["--lora.target_modules=wq,wk,wv,wo,w1,w2,w3,output"],
    ),
    "fewer that are excluded": (
        ["--lora.target_modules=wq", "--lora.exclude_modules=layers.*"],
        "Exclude fewer of wq, wk, wv, wo, w1, w2, w3, output.",
        ["--lora.target_modules=wq", "--lora.exclude_modules=layers.0.*"],
    ),
    "one pattern of two": (
        ["--lora.rank_pattern", "wq", "8", "layers.1.*", "2"],
        "'wq' gives layers.1.attention.wq 8, 'layers.1.*' gives it 2. Keep one.",
        ["--lora.rank_pattern", "wq", "8"],
    ),
    "the folder of the base": (
        ["--checkpoint.initial_load_path=/nowhere/base"],
        "there is no such folder. Name the folder of the pretrained base.",
        [],
    ),
    "checkpoints on": (["--checkpoint.no-enable"], "Set it to true.", ["--checkpoint.enable"]),
    "the model alone of a base": (
        ["--checkpoint.no-initial_load_model_only"],
        "Leave it at true; a LoRA run resumes from its own checkpoint folder.",
        ["--checkpoint.initial_load_model_only"],
    ),
    "a part of a checkpoint": (
        ["--checkpoint.exclude_from_loading=dataloder"],
        "is no part of a checkpoint; the parts are model, optimizer, lr_scheduler, dataloader, train_state.",
        ["--checkpoint.exclude_from_loading=dataloader"],
    ),
    "the optimizer after the backward": (["--optimizer.early_step_in_backward"], "Leave it at false", []),
    "a base for the last step's adapter": (
        [*PEFT_OUT, *NO_BASE],
        "is stored nowhere else. Set checkpoint.initial_load_path, or leave it at false.",
        PEFT_OUT,
    ),
    "no optimizer in a PEFT directory": (
        ["--checkpoint.last_save_in_hf"],
        "set checkpoint.last_save_model_only = true.",
        PEFT_OUT,
    ),
    "a PEFT directory to merge": (
        ["--lora.save_merged", "--checkpoint.last_save_model_only"],
        "set checkpoint.last_save_in_hf = true and checkpoint.initial_load_in_hf = true.",
        ["--lora.save_merged", *PEFT_OUT],
    ),
    "the generator's state with dropout": (
        [*RECOMPUTED, "--activation_checkpoint.no-preserve_rng_state"],
        "what is recomputed would draw other masks than the forward had. Set preserve_rng_state = true.",
        [*RECOMPUTED, "--activation_checkpoint.preserve_rng_state"],
    ),
}


@pytest.fixture(scope="module")
def plain(hf_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The job that none of the troubles has."""
    return train(tmp_path_factory.mktemp("plain"), *on(hf_base), STEPS)


@pytest.mark.parametrize("name", REMEDIES)
def test_the_job_trains_on_its_base_once_the_setting_is_what_the_message_says(
    name: str, plain: Run, hf_base: Path, tmp_path: Path
) -> None:
    trouble, advice, remedy = REMEDIES[name]
    with pytest.raises(ValueError) as error:
        build(tmp_path, *on(hf_base), STEPS, *trouble)
    assert advice in str(error.value)
    run = train(tmp_path, *on(hf_base), STEPS, *remedy)
    # New adapters change nothing: the first loss is the base's, whatever they are on. Emulated float8 rounds it.
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-2 if FLOAT8 in remedy else 1e-6)
    assert all(value.any() for key, value in adapter_state(run).items() if "lora_b" in key)
    written = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert written == {"step-2"} | ({"merged-2"} if "--lora.save_merged" in remedy else set())


def test_without_a_base_the_last_step_is_written_with_last_save_in_hf_at_false(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"or leave it at false\.$"):
        build(tmp_path, *NO_BASE, *PEFT_OUT)
    train(tmp_path, *NO_BASE, STEPS, "--checkpoint.last_save_model_only")
    assert (step(tmp_path, 2) / ".metadata").exists()


def test_without_the_config_module_the_named_line_makes_it_a_lora_job(hf_base: Path, tmp_path: Path) -> None:
    text = BASE_CONFIG.read_text().replace("[model]", '[model]\nconverters = ["lora"]', 1)
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        build(tmp_path / "run", *on(hf_base), STEPS, config=tmp_path / "job.toml")
    assert "job.custom_config_module is not set" in str(error.value)
    line = 'custom_config_module = "lora_converter.titan"'
    assert str(error.value).endswith('add custom_config_module = "lora_converter.titan" under [job].')
    (tmp_path / "job.toml").write_text(text.replace("[job]", f"[job]\n{line}", 1))
    run = train(tmp_path / "run", *on(hf_base), STEPS, config=tmp_path / "job.toml")
    assert len(run.losses) == 2 and all(value.any() for value in adapter_state(run).values())


def test_settings_that_are_left_out_come_from_the_adapter(hf_base: Path, tmp_path: Path) -> None:
    options = ["--lora.rank=6", "--lora.alpha=5", "--lora.use_rslora"]
    first = train(tmp_path / "first", *on(hf_base), STEPS, *PEFT_OUT, *options)
    text = BASE_CONFIG.read_text().replace("[model]", '[model]\nconverters = ["lora"]', 1)
    text = text.replace("[job]", '[job]\ncustom_config_module = "lora_converter.titan"', 1)
    adapter = step(tmp_path / "first", 2)
    for lora in ("rank = 8", "alpha = 8.0", ""):
        (tmp_path / "job.toml").write_text(f'{text}\n[lora]\ninitial_adapter_path = "{adapter}"\n{lora}\n')
        command = ["--job.config_file", f"{tmp_path}/job.toml"]
        if lora:
            name = lora.split(" ")[0]
            with pytest.raises(ValueError, match=rf"lora\.{name} = 8.* Leave lora\.{name} out to take the adapter's"):
                build(tmp_path / "run", *on(hf_base), config=tmp_path / "job.toml")
    assert ConfigManager().parse_args([*command, *TINY_ARGS]).lora.rank == 16
    run = build(tmp_path / "run", *on(hf_base), "--lora.alpha=32", config=tmp_path / "job.toml")
    run.trainer.checkpointer.load()
    expected, found = adapter_state(first), adapter_state(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {c.scaling for c in run.trainer.checkpointer.run.model.configs().values()} == {5 / 6**0.5}
    run.trainer.close()


def quantized(base: Path, folder: Path, copy: Path) -> None:
    """`base` with attention in float8 and scales for its blocks, as DeepSeek publishes it; and what that stands for."""
    tensors, plain = load_file(base / "model.safetensors"), load_file(base / "model.safetensors")
    for key in [key for key in tensors if "self_attn" in key and key.endswith("proj.weight")]:
        scale = tensors[key].abs().max().view(1, 1) / 448  # all weights are of one block
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"], plain[key] = scale, tensors[key].float() * scale
    for folder_, stored in ((folder, tensors), (copy, plain)):
        shutil.copytree(base, folder_)
        save_file(stored, folder_ / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_adapter_of_a_quantized_base_is_merged_into_an_unquantized_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = HF_MODELS["deepseek_v3"]
    quantized(save_hf("deepseek_v3", tmp_path / "base"), tmp_path / "quantized", tmp_path / "copy")
    options = [*model.options, *on(tmp_path / "quantized"), "--checkpoint.initial_load_in_hf_quantized", *PEFT_OUT]
    with pytest.raises(
        ValueError, match=r"Leave save_merged at false and merge into an unquantized copy with `lora-converter merge`\."
    ):
        build(tmp_path / "run", *options, "--lora.save_merged")
    run = train(tmp_path / "run", *options)
    paths = ["--adapter", str(step(tmp_path / "run", 3)), "--output", str(tmp_path / "merged")]
    assert main(["merge", "--base", str(tmp_path / "quantized"), *paths]) == 1
    assert "is quantized (F8_E4M3); merge into an unquantized copy of the base" in capsys.readouterr().err
    assert main(["merge", "--base", str(tmp_path / "copy"), *paths]) == 0
    merged = type(model.make()).from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        expected, found = run.trainer.model_parts[0].eval()(TOKENS), merged.eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=model.atol)
