"""What messages about `lora.new_tokens` ask for, done until the trouble is gone."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_job import chat_options
from harness import ROOT, Run, adapter_state, build, train
from hf_tiny import tiny_llama
from safetensors.torch import load_file, save_file
from test_new_tokens import ROWS
from test_new_tokens_peft import logits, made_by_peft
from tiny_models import get_train_spec
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lora_converter import LoRAConfig, adapter_parameters, apply_lora
from lora_converter.cli import main
from lora_converter.peft import into_model, load_peft
from lora_converter.titan.new_tokens import make_room

NEW = "--lora.new_tokens=<a>,<b>"


def refused(folder: Path, *options: str) -> str:
    with pytest.raises(ValueError) as error:
        build(folder, *options).trainer.checkpointer.load()
    return str(error.value)


def rows_train(run: Run) -> bool:
    return adapter_state(run).keys() >= ROWS


@pytest.fixture
def on(hf_base: Path) -> list[str]:
    return [f"--checkpoint.initial_load_path={hf_base}", "--checkpoint.initial_load_in_hf", "--training.steps=1"]


def test_a_head_trains_in_one_way(on: list[str], tmp_path: Path) -> None:
    both = "--lora.target_modules=wq,output"
    message = refused(tmp_path, *on, NEW, both)
    assert "Add output to lora.exclude_modules, or leave new_tokens out." in message
    assert rows_train(train(tmp_path / "1", *on, NEW, both, "--lora.exclude_modules=output"))
    assert not rows_train(train(tmp_path / "2", *on, both))


def test_a_tied_head_is_on_the_embeddings_stage() -> None:
    """The host's model of a pipeline with a tied head does not begin, so it is looked at before it is split."""

    def model() -> torch.nn.Module:
        with torch.device("meta"):
            spec = get_train_spec("qwen3")
            return spec.model_cls(spec.model_args["tiny_tied"])

    tokens = {"<a>": 320}
    with pytest.raises(ValueError, match=r"would be on two stages, each with rows of its own\. Set parallelism\."):
        make_room(model(), tokens, SimpleNamespace(pp_enabled=True))
    asked = "Set parallelism.pipeline_parallel_degree = 1"
    degree = int(asked.rpartition(" ")[2])
    mended = model()
    assert make_room(mended, tokens, SimpleNamespace(pp_enabled=degree > 1)) == 320
    assert mended.output.weight is mended.tok_embeddings.weight and len(mended.output.weight) == 321


def test_tokens_are_for_one_phase(on: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *on, NEW, "--lora.full_phase.steps=1")
    assert (
        "lora.new_tokens with lora.full_phase, whose tokenizer and model lack them. Leave one of the two out."
        in message
    )
    assert rows_train(train(tmp_path / "1", *on, NEW))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_directory_with_rows_is_started_from_with_its_tokens(on: list[str], tmp_path: Path) -> None:
    end = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    train(tmp_path / "first", *on, NEW, *end)
    start = f"--lora.initial_adapter_path={tmp_path}/first/checkpoint/step-1"
    message = refused(tmp_path / "second", *on, start)
    assert 'Set lora.new_tokens = ["<a>", "<b>"].' in message
    message = refused(tmp_path / "swapped", *on, start, "--lora.new_tokens=<b>,<a>")  # the same ids, other tokens
    assert 'Set lora.new_tokens = ["<a>", "<b>"].' in message
    run = build(tmp_path / "third", *on, start, NEW)
    run.trainer.checkpointer.load()
    assert rows_train(run)
    run.trainer.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_live_model_is_given_the_tokens_of_the_adapter(tmp_path: Path) -> None:
    made_by_peft(tiny_llama(), tmp_path / "a", tied=False)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"give apply_lora tokens = \[7, 320, 321\]"):
        into_model(load_peft(tmp_path / "a"), model)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["q_proj"]), tokens=[7, 320, 321])
    into_model(load_peft(tmp_path / "a"), model)
    assert adapter_parameters(model)["lm_head.lora_token_rows"].abs().min() > 0


def test_a_live_model_is_given_ids_for_text() -> None:
    model, tokenizer = tiny_llama(), Tokenizer.from_file(f"{ROOT}/tests/assets/tokenizer/tokenizer.json")
    tokenizer.add_tokens(["<a>"])
    config = LoRAConfig(target_modules=["q_proj"], new_tokens=["<a>"])
    with pytest.raises(ValueError, match=r"no tokenizer to know their ids by\. Give it their ids: tokens = "):
        apply_lora(model, config)
    apply_lora(model, config, tokens=[tokenizer.token_to_id("<a>")])
    assert adapter_parameters(model)["lm_head.lora_token_rows"].shape == (1, 64)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_with_rows_are_merged_where_they_cannot_be_summed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    expected = made_by_peft(tiny_llama(), tmp_path / "a", tied=False)
    two = [f"{tmp_path}/a", f"{tmp_path}/a"]
    assert main(["combine", *two, "--output", f"{tmp_path}/sum"]) != 0
    told = capsys.readouterr().err
    assert "has trained rows of tokens (lm_head, model.embed_tokens), which are not summed. Merge it with" in told
    assert "Merge it with `lora-converter merge`, and train the others on the result." in told
    assert main(["merge", "--base", f"{tmp_path}/base", "--adapter", f"{tmp_path}/a", "--output", f"{tmp_path}/m"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)


def test_a_token_that_the_base_never_learned_is_trained(
    chat: Path, hf_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also: conversations are encoded with new tokens, and with as many as the tokenizer has."""
    base = shutil.copytree(hf_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][1] = 0  # <eos>
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    options = [f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf", *chat_options(chat)]
    build(tmp_path / "1", *options).trainer.checkpointer.load()
    assert "or name them in lora.new_tokens, whose rows train" in caplog.text
    caplog.clear()
    run = train(tmp_path / "2", *options, "--lora.new_tokens=<eos>,cat", "--training.steps=2")
    assert "untrained rows" not in caplog.text
    cat = run.trainer.tokenizer.token_to_id("cat")
    assert any((batch == cat).any() for batch, _ in run.batches)
    assert rows_train(run)
