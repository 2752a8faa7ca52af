"""torchtitan 0.2.2's TOML files and command lines as jobs of 0.3: what arrives where, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tomllib
from jobs03 import ROOT
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.trainer import Trainer

from lora_converter.titan03.trainer import LoRATrainer
from lora_converter.toml03 import job as from_toml

FILES = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))

HERE: dict[str, Any] = {
    "job.dump_folder": lambda config: config.dump_folder,
    "job.description": None,
    "job.custom_config_module": None,
    "model.name": lambda config: config.model_spec.name,
    "model.flavor": lambda config: config.model_spec.flavor,
    "model.hf_assets_path": lambda config: config.hf_assets_path,
    "model.converters": lambda config: ["lora"] if isinstance(config, LoRATrainer.Config) else [],
    "optimizer.lr": lambda config: config.optimizer.param_groups[0].optimizer_kwargs["lr"],
    "optimizer.weight_decay": lambda config: config.optimizer.param_groups[0].optimizer_kwargs["weight_decay"],
    "training.dataset": lambda config: config.dataloader.dataset,
    "training.dataset_path": lambda config: config.dataloader.dataset_path,
    "activation_checkpoint.mode": lambda config: {
        type(None): "none",
        FullAC.Config: "full",
        SelectiveAC.Config: "selective",
    }[type(config.activation_checkpoint)],
    "activation_checkpoint.selective_ac_option": lambda config: "op",
    **{f"validation.{o}": (lambda config, o=o: getattr(config.validator, o)) for o in ("enable", "freq", "steps")},
    "validation.local_batch_size": None,  # that of training
    "checkpoint.initial_load_path": lambda config: (
        f"./{Path(config.checkpoint.initial_load_path).relative_to(Path.cwd())}"
    ),
}
"""0.2.2's option -> where 0.3 has it, of those that it has not under the same name."""


def found(config: Any, option: str) -> Any:
    if option in HERE:
        return HERE[option](config)
    for part in option.split("."):
        config = getattr(config, part)
    return config


def job(*arguments: str) -> Any:
    from_toml.arguments = list(arguments)
    return from_toml.job()


def of(folder: Path, text: str, *arguments: str) -> Any:
    (folder / "job.toml").write_text(text)
    return job(f"--job.config_file={folder / 'job.toml'}", *arguments)


@pytest.mark.parametrize("name", FILES)
def test_every_option_of_our_files_arrives(name: str) -> None:
    config, path = job("--job.config_file", f"configs/{name}"), ROOT / "configs" / name
    options = {f"{s}.{o}": v for s, table in tomllib.loads(path.read_text()).items() for o, v in table.items()}
    told = {option: value for option, value in options.items() if HERE.get(option, True) is not None}
    assert len(told) > 10 and {option: found(config, option) for option in told} == told


def test_conversations_are_validated_on_beside_training_on_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'validation.dataset = "chat" .it is for jobs with training.dataset = "chat"'):
        of(tmp_path, '[validation]\nenable = true\ndataset = "chat"\n')


AS_IT_WAS = {
    "model_spec.name": "llama3",
    "model_spec.flavor": "debugmodel",
    "hf_assets_path": "./tests/assets/tokenizer",
    "dump_folder": "./outputs",
    "dataloader.dataset": "c4_test",
    "dataloader.dataset_path": None,
    "dataloader.num_workers": 0,
    "dataloader.infinite": True,
    "optimizer.implementation": "fused",
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "training.seq_len": 2048,
    "training.steps": 10000,
    "training.max_norm": 1.0,
    "training.dtype": "float32",
    "training.mixed_precision_param": "bfloat16",
    "training.disable_cuda_graphs": True,
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "parallelism.enable_sequence_parallel": True,
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_ratio": None,
    "checkpoint.enable": False,
    "checkpoint.interval": 500,
    "compile.enable": False,
    "profiler.save_traces_folder": "profile_traces",
    "profiler.save_memory_snapshot_folder": "memory_snapshot",
    "metrics.log_freq": 10,
    "validator.enable": False,
    "validator.dataloader.dataset": "c4_validation",
    "debug.seed": None,
    "comm.init_timeout_seconds": 300,
}
"""What 0.2.2 does where a file says nothing (its JobConfig), under 0.3's names."""


def test_an_option_that_is_left_out_means_what_it_meant(tmp_path: Path) -> None:
    config = of(tmp_path, "")
    assert type(config) is Trainer.Config
    assert {option: found(config, option) for option in AS_IT_WAS} == AS_IT_WAS
    (group,) = config.optimizer.param_groups
    betas_and_rest = {"lr": 8e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert (group.optimizer_name, group.optimizer_kwargs) == ("AdamW", betas_and_rest)


def test_selection_by_layer_becomes_that_by_operator_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "activation_checkpoint.selective_ac_option: torchtitan 0.3 selects by operator, not by layer."
    for text, says in (("", True), ('[activation_checkpoint]\nselective_ac_option = "op"', False)):
        caplog.clear()
        assert type(of(tmp_path, text).activation_checkpoint) is SelectiveAC.Config
        assert (told in caplog.messages) is says


LORA = '[model]\nconverters = ["lora"]\n[lora]\nrank = 16\n[optimizer]\nlr = 1e-3\n'


def test_the_command_line_wins_in_either_spelling(tmp_path: Path) -> None:
    config = of(
        tmp_path, LORA, "--lora.rank", "8", "--lora.target_modules=wq,wv", "--lora.exclude_modules", "",
        "--lora.use_rslora", "--optimizer.lr=0.5",
        "--checkpoint.enable", "--metrics.no-enable_tensorboard", "--model.flavor", "8B",
        "--lora.rank_pattern", "wq", "4", "--training.dataloader.num_workers=2", "--job.dump-folder", "here",
    )  # fmt: skip
    assert (config.lora.rank, config.lora.target_modules, config.lora.exclude_modules) == (8, ["wq", "wv"], [])
    assert (config.lora.use_rslora, config.lora.rank_pattern, config.lora.alpha) == (True, {"wq": 4}, 32.0)
    assert config.optimizer.param_groups[0].optimizer_kwargs["lr"] == 0.5
    assert (config.checkpoint.enable, config.metrics.enable_tensorboard) == (True, False)
    assert (config.model_spec.flavor, config.dataloader.num_workers, config.dump_folder) == ("8B", 2, "here")


MORE = {
    "[profiling]\nenable_profiling = true\nprofile_freq = 3": {
        "profiler.enable_profiling": True,
        "profiler.profile_freq": 3,
    },
    "[comm]\ninit_timeout_seconds = 7": {"comm.init_timeout_seconds": 7},
    "[debug]\nseed = 3\ndeterministic = true": {"debug.seed": 3, "debug.deterministic": True},
    "[job]\nprint_config = true\nsave_config_file = 'c.json'": {
        "debug.print_config": True,
        "debug.save_config_file": "c.json",
    },
    "[lr_scheduler]\ndecay_ratio = 0.5\ndecay_type = 'cosine'": {
        "lr_scheduler.decay_ratio": 0.5,
        "lr_scheduler.decay_type": "cosine",
    },
    "[validation]\nenable = true\nsteps = 3\ndataset = 'c4_test'\ndataset_path = 'd'\nseq_len = 2048": {
        "validator.enable": True,
        "validator.steps": 3,
        "validator.dataloader.dataset": "c4_test",
        "validator.dataloader.dataset_path": "d",
    },
    "[parallelism]\nenable_async_tensor_parallel = true\n[compile]\nenable = true": {
        "compile.enable_async_tensor_parallel": True
    },
    "[parallelism]\nfsdp_reshard_after_forward = 'never'\npipeline_parallel_microbatch_size = 2": {
        "parallelism.fsdp_reshard_after_forward": "never",
        "parallelism.pipeline_parallel_microbatch_size": 2,
    },
    "[parallelism]\nspmd_backend = 'partial_dtensor'": {"parallelism.spmd_backend": "partial_dtensor"},
    "[activation_checkpoint]\nmode = 'full'\npreserve_rng_state = false": {
        "activation_checkpoint.preserve_rng_state": False
    },
    "[activation_checkpoint]\nmode = 'memory_budget'\nmemory_budget = 0.3\n[compile]\nenable = true": {
        "activation_checkpoint.memory_budget": 0.3
    },
    "[activation_checkpoint]\nper_op_sac_force_recompute_mm_shapes_by_fqns = ['wq']\nselective_ac_option = 'op'": {
        "activation_checkpoint.force_recompute_mm_shapes_by_fqns": ["wq"]
    },
    "[optimizer]\nname = 'Adam'\nimplementation = 'foreach'": {"optimizer.implementation": "foreach"},
    "[experimental]\ncustom_import = 'torchtitan.models.qwen3'\n[model]\nname = 'mine'\nflavor = '0.6B'": {
        "model_spec.flavor": "0.6B"
    },
    "[model]\nflavor = '8B_flex'": {"model_spec.flavor": "8B"},
    "[parallelism]\nexpert_tensor_parallel_degree = 1\n[fault_tolerance]\nenable = false\n": {},
}
"""Other options of a TOML file -> what a config has of them. The last ask for nothing."""


@pytest.mark.parametrize("text", MORE)
def test_other_options_arrive(text: str, tmp_path: Path) -> None:
    config = of(tmp_path, text)
    assert {option: found(config, option) for option in MORE[text]} == MORE[text]


def test_modes_of_recomputation_are_classes_here(tmp_path: Path) -> None:
    text = "[activation_checkpoint]\nmode = 'memory_budget'\n[compile]\nenable = true"
    assert type(of(tmp_path, text).activation_checkpoint) is MemoryBudgetAC.Config


def test_all_that_cannot_be_translated_is_told_at_once(tmp_path: Path) -> None:
    text = """
[training]
stepz = 3
[parallelism]
expert_tensor_parallel_degree = 2
context_parallel_rotate_method = "alltoall"
[quantize.linear.float8]
recipe_name = "rowwise"
[lora]
full_phase = { steps = 3 }
[trainin]
steps = 3
"""
    with pytest.raises(ValueError) as error:
        of(tmp_path, text, "--optimizer.early_step_in_backward", "--optimizer.lrr=3")
    assert str(error.value) == (
        "torchtitan 0.3 has no counterpart of training.stepz (no such option; training.steps is one); "
        "parallelism.expert_tensor_parallel_degree (experts are sharded by parallelism.expert_parallel_degree alone); "
        "parallelism.context_parallel_rotate_method (keys and values are always gathered); "
        "quantize (a config function says model_registry(..., converters=[Float8LinearConverter.Config(...)])); "
        "lora.full_phase (its first phase is not run yet: train it as a job of its own); "
        "trainin (no such option; training is one); "
        "optimizer.early_step_in_backward (no optimizer steps in the backward); "
        "optimizer.lrr (no such option; optimizer.lr is one)."
    )


WRONG = {
    "[model]\nconverters = ['quantize.linear.float8', 'lora']": "model.converters: quantize.linear.float8 (a config "
    "function says model_registry(..., converters=[Float8LinearConverter.Config(...)]), then "
    "lora_converter.titan03.lora(config))",
    "[validation]\nenable = true\nseq_len = 64": "validation.seq_len = 64 (it is that of training)",
    "[activation_checkpoint]\nmode = 'some'": "activation_checkpoint.mode = 'some' (it is one of none, full, ",
    "[activation_checkpoint]\nselective_ac_option = 'layer'": "selective_ac_option = 'layer' (it is 'op')",
    "[model]\nname = 'llama4'": "model.name = 'llama4': torchtitan 0.3 has deepseek_v3, flux, gpt_oss, ",
    "[model]\nflavor = '9B'": "model.flavor = '9B': torchtitan 0.3's llama3 has debugmodel, 1B, 3B, 8B, 70B, 405B.",
    "[experimental]\ncustom_import = 'json'": "json has no model_registry(flavor), which torchtitan 0.3 asks for",
    "[lora]\nrank = 0\n[model]\nconverters = ['lora']": "lora.rank = 0: must be an integer of at least 1.",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_value_that_cannot_be_translated_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        of(tmp_path, text)
    assert WRONG[text] in str(error.value)
