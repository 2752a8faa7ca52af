"""torchtitan 0.3's own config functions with adapters: what `lora` may be given, and jobs by their command lines."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from jobs03 import ROOT, build, finish, host_config, trained_tensors
from torchtitan.components.lora import LoRAConverter
from torchtitan.hf_datasets.text_datasets import ChatDataLoader
from torchtitan.models import llama3
from torchtitan.models.common.linear import Linear

from lora_converter.adapted import adapted_modules
from lora_converter.linear import LoRALinear
from lora_converter.titan03 import configs, lora
from lora_converter.titan03.checks import check_settings
from lora_converter.titan03.model import unfuse_qkv, with_adapters
from lora_converter.titan03.trainer import job_of
from lora_converter.titans.checks import shared_options

SMALL = ["--training.seq_len=128", "--training.local_batch_size=2"]


class Halved(Linear):
    """A linear as quantization makes them: another class, with a setting, that computes with less of its weight."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        keep: float = 1.0

    def __init__(self, config: Config):
        super().__init__(config)
        self.keep = config.keep

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.keep * super().forward(input)


def halve(model: Any) -> Any:
    """What torchtitan's converters do to a model's config."""
    for fqn, linear, parent, name in model.traverse(Linear.Config):
        if fqn != "lm_head":
            own = dict(in_features=linear.in_features, out_features=linear.out_features, param_init=linear.param_init)
            setattr(parent, name, Halved.Config(keep=0.5, **own))
    return model


def test_a_quantized_config_gets_adapters_on_its_quantized_linears(tmp_path: Path) -> None:
    plain = host_config(tmp_path, training__steps=1)
    halve(plain.model_spec.model)
    config = lora(plain, rank=4)
    unfuse_qkv(config.model_spec.model)
    linears = list(adapted_modules(with_adapters(lambda: job_of(config), config).build()))
    assert len(linears) == 28 and all(isinstance(m, LoRALinear) and isinstance(m, Halved) for m in linears)
    assert {m.keep for m in linears} == {0.5}  # of q, k and v, too, which were one
    assert job_of(config).converters == ("Halved.Config",) and job_of(lora(host_config(tmp_path))).converters == ()
    linear = linears[0]
    for param in linear.parameters():
        nn.init.normal_(param)
    x = torch.randn(3, linear.in_features)
    update = linear.lora_config.scaling * (x @ linear.lora_a.weight.T) @ linear.lora_b.weight.T
    torch.testing.assert_close(linear(x), 0.5 * x @ linear.weight.T + update)
    assert not linear.weight.requires_grad


def test_a_config_is_left_as_it_was_and_can_be_built_from_again(tmp_path: Path) -> None:
    plain = host_config(tmp_path, training__steps=1, checkpoint__enable=False)
    before = repr(plain)
    adapted = lora(plain, rank=4)
    first, second = (finish(build(adapted)) for _ in range(2))
    assert first.losses == second.losses and trained_tensors(first) == trained_tensors(second) == 56
    assert repr(plain) == before


def test_adapters_are_put_on_once() -> None:
    with pytest.raises(ValueError, match=r"has adapters already\. Call lora\(\) once, with all settings\."):
        lora(lora(configs.llama3_debugmodel_lora.args[0]()))
    theirs = configs.llama3_debugmodel_lora.args[0]()
    theirs.model_spec = llama3.model_registry("debugmodel", converters=[LoRAConverter.Config(rank=8)])
    with pytest.raises(ValueError, match="The model has torchtitan's own LoRA"):
        lora(theirs)


def test_ready_configs_are_those_of_the_hosts_registries_with_adapters() -> None:
    names = {name for name in vars(configs) if name.endswith("_lora")}
    assert names == {
        *(f"llama3_{size}_lora" for size in ("debugmodel", "8b", "70b", "405b")),
        *(f"qwen3_{size}_lora" for size in ("debugmodel", "0_6b", "1_7b", "14b", "32b", "30b_a3b", "moe_debug")),
        *(f"deepseek_v3_{size}_lora" for size in ("debugmodel", "16b", "671b")),
    }
    config, plain = configs.llama3_8b_lora(), configs.llama3_8b_lora.args[0]()
    assert (config.model_spec.flavor, config.lora.rank, config.optimizer) == ("8B", 16, plain.optimizer)
    assert config.checkpoint.enable and config.checkpoint.initial_load_in_hf
    assert config.training.disable_cuda_graphs and not plain.training.disable_cuda_graphs
    assert not configs.deepseek_v3_debugmodel_lora().checkpoint.initial_load_in_hf


REFUSED = {
    "hf_assets_path = '/nowhere': there is no such folder.": dict(
        hf_assets_path="/nowhere", checkpoint__initial_load_in_hf=True
    ),
    "checkpoint.initial_load_model_only = false": dict(
        checkpoint__initial_load_path=str(ROOT), checkpoint__initial_load_model_only=False
    ),
    "checkpoint.exclude_from_loading: 'loader' is no part of a checkpoint": dict(
        checkpoint__exclude_from_loading=["loader"]
    ),
    "the adapter would be written without its base": dict(checkpoint__last_save_in_hf=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_by_the_hosts_names(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_settings(lora(host_config(tmp_path, **REFUSED[message])))
    check_settings(lora(host_config(tmp_path)))


def command(*arguments: str, ranks: int = 1) -> str:
    """Runs `lora_converter.train` under torchrun from the top folder, as a user does. Returns its log."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "lora_converter.train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    log = re.sub(r"\x1b\[[\d;]*m", "", done.stderr + done.stdout)
    assert done.returncode == 0, log[-3000:]
    return log


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step: +\d+ +loss: +([\d.]+)", log)]


def test_a_job_of_a_ready_config_by_its_command_line(tmp_path: Path) -> None:
    log = command(
        *("--module", "lora_converter.titan03.configs", "--config", "llama3_debugmodel_lora", "--lora.rank", "3"),
        *("--lora.target_modules", "wq,wv", "--dataloader.dataset_path", "tests/assets/c4_test", *SMALL),
        *("--training.steps", "2", "--dump_folder", str(tmp_path), "--metrics.log_freq", "1"),
    )
    assert "LoRA: 12 linears adapted (rank 3, alpha 32)" in log and len(losses(log)) == 2


@pytest.mark.parametrize("arguments", [["--module=lora_converter.titan03.configs", "--config=llama3_8b_lora"]])
def test_help_explains_our_options(arguments: list[str]) -> None:
    log = " ".join(re.sub(r"[│|]", " ", command(*arguments, "--help")).split())
    assert "--lora.target-modules A,B,C,..." in log and "Linears that get an adapter: 'all-linear'" in log


@pytest.mark.slow
def test_our_files_by_their_command_lines_on_one_rank_and_two_with_a_resume(tmp_path: Path) -> None:
    base = ["--job.config_file", "configs/debug_base.toml", f"--job.dump_folder={tmp_path / 'base'}"]
    assert len(losses(command(*base, *SMALL, "--training.steps=2"))) == 2
    job = [
        "--job.config_file",
        "configs/debug_lora.toml",
        *SMALL,
        "--checkpoint.interval=2",
        "--lr_scheduler.total_steps=4",
    ]
    job += [f"--checkpoint.initial_load_path={tmp_path / 'base' / 'checkpoint' / 'step-2'}"]
    one = command(*job, f"--job.dump_folder={tmp_path / 'one'}", "--training.steps=2")
    assert "42 linears adapted (rank 16" in one
    resumed = command(*job, f"--job.dump_folder={tmp_path / 'one'}", "--training.steps=4")
    assert f"resuming from {tmp_path / 'one' / 'checkpoint' / 'step-2'}" in resumed
    whole = command(*job, f"--job.dump_folder={tmp_path / 'whole'}", "--training.steps=4")
    assert [*losses(one), *losses(resumed)] == losses(whole) and len(losses(whole)) == 4
    two = command(*job, f"--job.dump_folder={tmp_path / 'two'}", "--training.steps=2", ranks=2)
    assert len(losses(two)) == 4  # each rank logs
    again = command(*job, f"--job.dump_folder={tmp_path / 'two'}", "--training.steps=3", ranks=2)
    assert "resuming from" in again and len(losses(again)) == 2


def test_the_configs_of_the_page_are_made() -> None:
    """docs/torchtitan03.md"""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torchtitan03.md").read_text(), re.S)
    functions: dict[str, Any] = {}
    exec(block, functions)
    plain, chats = functions["llama3_8b_lora"](), functions["llama3_8b_chat"]()
    assert plain.lora.rank == 16 and plain.checkpoint.initial_load_in_hf
    assert chats.chat.epochs == 2.0 and chats.lora.alpha == 32.0


def test_a_loaders_functions_are_the_same_in_another_process(tmp_path: Path) -> None:
    """Their addresses are not: ranks are compared, and a resumed run's data with those of its step."""

    def with_a_function() -> Any:
        def process(sample: Any) -> Any:
            return sample

        return lora(
            host_config(tmp_path, dataloader=ChatDataLoader.Config(dataset_path="json", sample_processor=process))
        )

    first, second = with_a_function(), with_a_function()
    assert first.to_dict()["dataloader"] != second.to_dict()["dataloader"]
    assert job_of(first).data == job_of(second).data
    assert shared_options(first.to_dict(), ()) == shared_options(second.to_dict(), ())


def test_jobs_of_one_config_share_nothing(tmp_path: Path) -> None:
    plain = host_config(tmp_path)
    one, other = lora(plain, rank=4), lora(plain, rank=8)
    one.checkpoint.interval, one.optimizer.param_groups[0].optimizer_kwargs["lr"] = 77, 9.0
    one.model_spec.model.dim = 1
    assert other.checkpoint.interval == plain.checkpoint.interval != 77
    assert other.optimizer == plain.optimizer and other.model_spec.model.dim == plain.model_spec.model.dim
