"""Folders that others made, bases, adapters and steps: what the message says is done, and the job has them."""

import collections
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import TINY, Run, build, finish, train
from hf_tiny import tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoint import failing
from test_foreign_folders import TOKENS, logits, peft_adapter
from test_remedies_of_runs import LONGER, PEFT, goes_on
from test_resume import loaded, on, step
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

from lora_converter.cli import main
from lora_converter.merge import merge_directories
from lora_converter.peft import load_peft

pytestmark = pytest.mark.slow

# Bases


def sharded(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder, max_shard_size="300KB")
    return folder


def test_a_base_is_whole_once_the_shard_that_is_named_is_there(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    expected = peft_adapter(tmp_path / "adapter", base)
    lost = sorted(base.glob("model-*.safetensors"))[-1]
    lost.rename(tmp_path / lost.name)
    _, message = failing(tmp_path / "run", *on(base))
    assert message.endswith(f"is not complete: {lost.name} of model.safetensors.index.json is missing.")
    with pytest.raises(ValueError, match=f"{lost.name} of model.safetensors.index.json is missing"):
        merge_directories(base, tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / lost.name).rename(lost)
    start = [*on(base), f"--lora.initial_adapter_path={tmp_path}/adapter", "--lora.rank=16"]
    assert gives(loaded(tmp_path / "run", *start), expected)
    merge_directories(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(tiny_llama().from_pretrained(tmp_path / "merged")), expected)


def gives(run: Run, expected: torch.Tensor) -> bool:
    with torch.no_grad():
        torch.testing.assert_close(run.trainer.model_parts[0].eval()(TOKENS), expected, rtol=1e-4, atol=1e-4)
    return True


def test_a_hugging_face_base_is_read_with_the_option_that_is_named(hf_base: Path, tmp_path: Path) -> None:
    base = f"--checkpoint.initial_load_path={hf_base}"
    _, message = failing(tmp_path, base)
    assert "is not a complete DCP checkpoint, it has no .metadata file" in message
    assert message.endswith("For a Hugging Face folder set checkpoint.initial_load_in_hf = true.")
    assert gives(loaded(tmp_path, base, "--checkpoint.initial_load_in_hf"), logits(tiny_llama()))


def test_a_dcp_base_is_read_once_its_file_is_there(hf_base: Path, dcp_base: Path, tmp_path: Path) -> None:
    shutil.copytree(dcp_base, tmp_path / "base")
    file, base = tmp_path / "base" / "__0_0.distcp", f"--checkpoint.initial_load_path={tmp_path}/base"
    file.rename(tmp_path / file.name)
    _, message = failing(tmp_path / "run", base)
    assert message.endswith("is not complete: __0_0.distcp is missing.")
    (tmp_path / file.name).rename(file)
    assert gives(loaded(tmp_path / "run", base), logits(tiny_llama()))


def test_a_base_of_another_flavor_fits_the_right_one_or_another_folder(hf_base: Path, tmp_path: Path) -> None:
    llama3_args["tiny_deep"] = TransformerModelArgs(**{**TINY, "n_layers": 5})
    _, message = failing(tmp_path, *on(hf_base), "--model.flavor=tiny_deep")
    assert "does not fit the model. 9 keys are missing" in message and message.endswith(
        "Check model.flavor and the folder."
    )
    assert gives(loaded(tmp_path, *on(hf_base), "--model.flavor=tiny"), logits(tiny_llama()))


def test_a_model_without_names_in_hugging_face_loads_a_dcp_folder(
    hf_base: Path, dcp_base: Path, tmp_path: Path
) -> None:
    register_train_spec("nameless", replace(get_train_spec("llama3"), state_dict_adapter=None))
    model = "--model.name=nameless"
    with pytest.raises(ValueError, match=r"the model has no StateDictAdapter\. Load a DCP folder\.$"):
        loaded(tmp_path, *on(hf_base), model)
    assert gives(loaded(tmp_path, f"--checkpoint.initial_load_path={dcp_base}", model), logits(tiny_llama()))


# Adapters


@pytest.mark.parametrize(("vocabulary", "targets"), [(320, ["q_proj", "lm_head"]), (330, ["q_proj"])])
def test_an_adapter_that_brings_weights_is_merged_and_the_result_trained_on(
    vocabulary: int, targets: list[str], hf_base: Path, tmp_path: Path
) -> None:
    model, flavor = tiny_llama(), "tiny"
    if vocabulary == 320:
        with torch.no_grad():
            model.lm_head.weight[3] += 1.0
    else:
        model.resize_token_embeddings(330, mean_resizing=False)
        flavor = "tiny_330"
        llama3_args[flavor] = TransformerModelArgs(**{**TINY, "vocab_size": 330})
    expected = peft_adapter(tmp_path / "adapter", hf_base, model=model, target_modules=targets, save_embeddings=True)
    start = f"--lora.initial_adapter_path={tmp_path}/adapter"
    told = "brings output.weight of another base than this one" if vocabulary == 320 else "brings tok_embeddings.weight"
    with pytest.raises(
        ValueError, match=rf"{told}.*Merge it first \(`lora-converter merge`\), and train on the result\."
    ):
        loaded(tmp_path / "run", *on(hf_base), start, "--lora.rank=16")
    paths = ["--base", str(hf_base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *paths]) == 0
    result = [*on(tmp_path / "merged"), f"--model.flavor={flavor}"]
    assert gives(loaded(tmp_path / "run", *result), expected)
    assert len(goes_on(tmp_path / "run", *result).losses) == 3


def test_the_linears_are_those_of_the_adapter_or_left_out(hf_base: Path, tmp_path: Path) -> None:
    expected = peft_adapter(tmp_path / "adapter", hf_base)
    start = [*on(hf_base), f"--lora.initial_adapter_path={tmp_path}/adapter", "--lora.rank=16"]
    for trouble, told in (("wq,wk", "adapted modules are missing in it"), ("wk,wo", "have no adapter here")):
        with pytest.raises(ValueError, match=rf"{told}.* Check lora\.target_modules\.$"):
            loaded(tmp_path / "run", *start, f"--lora.target_modules={trouble}")
    for remedy in (["--lora.target_modules=wq"], []):
        assert gives(loaded(tmp_path / "run", *start, *remedy), expected)


def test_factors_of_a_randomised_pissa_are_read_once_peft_has_converted_them(hf_base: Path, tmp_path: Path) -> None:
    init = "pissa_niter_4"
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param += 0.1
    expected = logits(model)
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match=r"is not supported; it must be .*path_initial_model_for_weight_conversion"):
        merge_directories(hf_base, tmp_path / "pissa", tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merge_directories(hf_base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        logits(tiny_llama().from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4
    )


def test_linears_without_a_hugging_face_name_are_excluded_or_the_step_stays_dcp(tmp_path: Path) -> None:
    model = ["--model.name=llama4", "--model.flavor=hf_tiny_dense"]
    seed = build(tmp_path / "seed", *model, "--checkpoint.initial_load_path=", "--checkpoint.create_seed_checkpoint")
    seed.trainer.checkpointer.save(curr_step=0, last_step=True)
    seed.trainer.close()
    job = [*model, f"--checkpoint.initial_load_path={step(tmp_path / 'seed', 0)}", "--checkpoint.last_save_model_only"]
    advice = r"Name them in lora\.exclude_modules, or leave last_save_in_hf at false\.$"
    with pytest.raises(ValueError, match=advice) as error:
        build(tmp_path / "run", *job, "--checkpoint.last_save_in_hf")
    named = str(error.value).split("adapted modules: ")[1].partition(". Name")[0].split(", ")
    goes_on(tmp_path / "left", *job)
    assert (step(tmp_path / "left", 3) / ".metadata").exists()
    goes_on(tmp_path / "run", *job, "--checkpoint.last_save_in_hf", f"--lora.exclude_modules={','.join(named)}")
    assert load_peft(step(tmp_path / "run", 3)).factors


def test_weights_that_cannot_be_merged_are_excluded_or_not_merged(hf_base: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_base, tmp_path / "base")
    weights = load_file(hf_base / "model.safetensors")
    key = "model.layers.1.self_attn.o_proj.weight"
    stored = {**weights, key: weights[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(1, 1)}
    save_file(stored, tmp_path / "base/model.safetensors", {"format": "pt"})
    job = [*on(tmp_path / "base"), "--checkpoint.last_save_model_only", *PEFT]
    with pytest.raises(ValueError, match=r"Name their modules in lora\.exclude_modules, or leave save_merged at false"):
        build(tmp_path / "run", *job, "--lora.save_merged")
    goes_on(tmp_path / "left", *job)
    assert key.removesuffix(".weight") in load_peft(step(tmp_path / "left", 3)).factors
    goes_on(tmp_path / "run", *job, "--lora.save_merged", "--lora.exclude_modules=layers.1.attention.wo")
    merged = load_file(tmp_path / "run" / "checkpoint" / "merged-3" / "model.safetensors")
    moved = {name for name in weights if not torch.equal(merged[name].float(), weights[name].float())}
    assert len(moved) == 28 and key in moved  # which float8 has rounded


# Foreign values in a step


class Allowed:
    """A module of the user's that allows what its data loader stores."""

    def __init__(self, folder: Path):
        (folder / "my_loader.py").write_text(
            "import collections, torch\ntorch.serialization.add_safe_globals([collections.deque])\n"
        )
        self.folder = str(folder)

    def __enter__(self) -> None:
        self.before = torch.serialization.get_safe_globals()
        sys.path.insert(0, self.folder)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self.folder)
        sys.modules.pop("my_loader", None)
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(self.before)


@pytest.mark.parametrize("way", ["allowed", "left out"])
def test_the_state_of_a_foreign_data_loader_is_allowed_or_left_out(way: str, hf_base: Path, tmp_path: Path) -> None:
    run = build(tmp_path, *on(hf_base), "--lr_scheduler.total_steps=5")
    loader = run.trainer.dataloader
    plain = loader.state_dict

    def foreign() -> dict:
        state = plain()
        rank = next(key for key in state if key.startswith("dp_rank"))
        return {**state, rank: pickle.dumps({**pickle.loads(state[rank]), "order": collections.deque([1])})}

    loader.state_dict = foreign
    finish(run)
    again = build(tmp_path, *on(hf_base), *LONGER)
    with pytest.raises(ValueError, match=r"names collections\.deque, which could run code when it is read") as error:
        again.trainer.checkpointer.load()
    assert "If you trust it, allow that with torch.serialization.add_safe_globals." in str(error.value)
    again.trainer.close()
    whole = train(tmp_path / "whole", *on(hf_base), *LONGER)
    if way == "allowed":
        with Allowed(tmp_path):
            found = goes_on(tmp_path, *on(hf_base), *LONGER, "--experimental.custom_import=my_loader")
        assert found.losses == whole.losses[3:]
    else:
        found = goes_on(tmp_path, *on(hf_base), *LONGER, "--checkpoint.exclude_from_loading=dataloader")
        assert found.trainer.step == 5 and len(found.losses) == 2
        assert torch.equal(found.batches[0][0], whole.batches[0][0])  # the data begin anew
