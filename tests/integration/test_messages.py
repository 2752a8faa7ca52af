"""A mistake in a TOML file or on the command line is refused before any weight exists, in words that say what to do."""

from pathlib import Path

import pytest
from harness import BASE_CONFIG, build, parse
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters

from lora_converter.titan.converter import LoRAConverter


def message_of(folder: Path, *args: str, config: Path | None = None) -> str:
    """What the user reads when the job of these arguments is started."""
    with pytest.raises(ValueError) as error:
        build(folder, "--checkpoint.initial_load_path=", *args, **({"config": config} if config else {}))
    return str(error.value)


@pytest.mark.parametrize(
    ("converters", "right"),
    [
        (["lora", "quantize.linear.float8"], ["quantize.linear.float8", "lora"]),
        (
            ["quantize.linear.float8", "lora", "quantize.grouped_mm.float8"],
            ["quantize.linear.float8", "quantize.grouped_mm.float8", "lora"],
        ),
    ],
)
def test_a_quantization_converter_after_lora_is_refused_with_the_right_order(
    converters: list[str], right: list[str], tmp_path: Path
) -> None:
    late = converters[-1]
    options = [f"--model.converters={','.join(converters)}", "--quantize.linear.float8.emulate"]
    assert message_of(tmp_path, *options) == (
        f'model.converters = {converters}: {late} stands after "lora" and would quantize the adapters. Write {right}.'
    )


def test_lora_twice_is_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path, "--model.converters=lora,lora") == (
        "model.converters = ['lora', 'lora']: \"lora\" stands twice. Write ['lora']."
    )


def test_a_converter_without_the_config_module_names_the_missing_line(tmp_path: Path) -> None:
    assert message_of(tmp_path, "--model.converters=lora", config=BASE_CONFIG) == (
        "LoRA is used, but job.custom_config_module is not set, so there is no [lora] section: add "
        'custom_config_module = "lora_converter.titan" under [job].'
    )


def test_an_unmatched_pattern_names_the_model_and_its_linears(tmp_path: Path) -> None:
    assert message_of(tmp_path, "--lora.target_modules=wq,wkv") == (
        "llama3/tiny: lora.target_modules: 'wkv' matches no linear of the model; the linears are wq, wk, wv, wo, w1, "
        "w2, w3, output."
    )


def test_an_empty_target_set_is_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path, "--lora.target_modules=wq", "--lora.exclude_modules=layers.*") == (
        "llama3/tiny: lora.exclude_modules = ['layers.*'] leaves nothing of lora.target_modules = ['wq']: nothing "
        "would be adapted. Exclude fewer of wq, wk, wv, wo, w1, w2, w3, output."
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lora.rank=0", "lora.rank = 0: must be an integer of at least 1."),
        ("--lora.alpha=-1", "lora.alpha = -1.0: must be a finite number above 0."),
        ("--lora.dropout=1.0", "lora.dropout = 1.0: must be at least 0 and below 1."),
    ],
)
def test_a_value_out_of_range_on_the_command_line_is_refused(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        parse(tmp_path, option)
    except ValueError as error:
        shown = str(error)
    except SystemExit:  # the argument parser prints the message itself
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    else:
        pytest.fail("accepted")
    assert message in shown


def test_a_value_out_of_range_in_the_toml_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('[job]\ncustom_config_module = "lora_converter.titan"\n[lora]\nrank = 0\n')
    with pytest.raises(ValueError, match=r"^lora.rank = 0: must be an integer of at least 1.$"):
        parse(tmp_path, config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint.initial_load_path=/nowhere/base"],
            "checkpoint.initial_load_path = '/nowhere/base': there is no such folder. Name the folder of the "
            "pretrained base.",
        ),
        (
            ["--lora.initial_adapter_path=/nowhere/adapter"],
            "lora.initial_adapter_path = '/nowhere/adapter': there is no such folder. Name a step folder "
            "or a PEFT directory.",
        ),
        (
            ["--checkpoint.initial_load_path=/", "--checkpoint.no-enable"],
            "checkpoint.initial_load_path is set, but nothing is loaded with checkpoint.enable = false. Set it to "
            "true.",
        ),
        (
            ["--checkpoint.initial_load_path=/", "--checkpoint.no-initial_load_model_only"],
            "checkpoint.initial_load_model_only = false: the base's optimizer state does not fit the adapters. Leave "
            "it at true; a LoRA run resumes from its own checkpoint folder.",
        ),
        (
            ["--checkpoint.exclude_from_loading=optimizer,dataloder"],
            "checkpoint.exclude_from_loading: 'dataloder' is no part of a checkpoint; the parts are model, optimizer, "
            "lr_scheduler, dataloader, train_state.",
        ),
        (
            ["--optimizer.early_step_in_backward"],
            "optimizer.early_step_in_backward = true: the adapters' gradients are complete only after the backward. "
            "Leave it at false; they take little memory.",
        ),
        (
            ["--checkpoint.last_save_in_hf"],
            "checkpoint.last_save_in_hf = true: the adapter would be written without its base, which has no source and "
            "is stored nowhere else. Set checkpoint.initial_load_path, or leave it at false.",
        ),
        (
            ["--checkpoint.last_save_in_hf", "--checkpoint.initial_load_path=/"],
            "checkpoint.last_save_in_hf = true makes the last step a PEFT directory, which cannot hold the optimizer: "
            "set checkpoint.last_save_model_only = true.",
        ),
        (
            ["--lora.save_merged", "--checkpoint.initial_load_path=/"],
            "lora.save_merged = true merges the last step's PEFT directory into a Hugging Face base: set "
            "checkpoint.last_save_in_hf = true and checkpoint.initial_load_in_hf = true.",
        ),
        (
            [
                "--lora.save_merged",
                "--checkpoint.initial_load_path=/",
                "--checkpoint.initial_load_in_hf",
                "--checkpoint.initial_load_in_hf_quantized",
                "--checkpoint.last_save_in_hf",
                "--checkpoint.last_save_model_only",
            ],
            "lora.save_merged = true with checkpoint.initial_load_in_hf_quantized = true: quantized weights cannot be "
            "merged into. Leave save_merged at false and merge into an unquantized copy with `lora-converter merge`.",
        ),
    ],
)
def test_checkpoint_settings_that_cannot_work_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert message_of(tmp_path, *options) == message


def test_float8_inputs_under_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, etp=1, world_size=2)
    options = ["--checkpoint.initial_load_path=", "--model.converters=quantize.linear.float8,lora"]
    with pytest.raises(ValueError, match=r"Set quantize\.linear\.float8\.recipe_name = .rowwise"):
        LoRAConverter(parse(tmp_path, *options), dims)
    LoRAConverter(parse(tmp_path, *options, "--quantize.linear.float8.recipe_name=rowwise"), dims)


def test_the_checks_happen_when_converters_are_built_before_the_model_is_touched(tmp_path: Path) -> None:
    config = parse(tmp_path, "--model.converters=lora,lora")
    with pytest.raises(ValueError, match="stands twice"):
        build_model_converters(config, None)


@pytest.mark.parametrize(("expert_tensor_parallel", "warned"), [(1, True), (2, False)])
def test_the_layout_whose_router_gradients_torchtitan_gets_wrong_is_warned_of(
    expert_tensor_parallel: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dims = ParallelDims(dp_replicate=1, dp_shard=2, cp=1, tp=2, pp=1, ep=2, etp=expert_tensor_parallel, world_size=4)
    with caplog.at_level("WARNING"):
        LoRAConverter(parse(tmp_path, "--checkpoint.initial_load_path="), dims)
    assert ("computes the MoE router's gradient wrongly there" in caplog.text) is warned
