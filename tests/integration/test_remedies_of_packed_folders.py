"""Bases that cannot be packed, and what to do then; and folders that are quantized in part."""

from pathlib import Path

import pytest
import torch
from harness import build, full_state
from hf_tiny import save_tiny_llama
from safetensors.torch import load_file
from test_packed_base import AS_RELEASED, NF4, formats_of, linears_of, on, save, through_nf4
from tiny_models import MODELS, WIDE_LLAMA


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("wide"), **WIDE_LLAMA)
    return {name: w.bfloat16().float() for name, w in load_file(folder / "model.safetensors").items()}


def test_what_the_hosts_adapter_leaves_out_is_not_packed_and_a_dcp_folder_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torchtitan's adapter for llama4 has no names for feed-forwards that are not routed."""
    model = MODELS["llama4"]
    seed = build(tmp_path / "seed", *model, "--checkpoint.initial_load_path=", "--checkpoint.create_seed_checkpoint")
    seed.trainer.checkpointer.save(curr_step=0, last_step=True)
    run = seed.trainer.checkpointer.run
    save(tmp_path / "base", run.host.state_dict_adapter.to_hf(dict(run.model.base.state_dict())))
    seed.trainer.close()
    in_hf = [*model, f"--checkpoint.initial_load_path={tmp_path}/base", "--checkpoint.initial_load_in_hf"]
    with pytest.raises(ValueError, match=r"does not name: (\S+, )*layers\.0\.feed_forward\.w1") as error:
        _loaded(tmp_path / "1", *in_hf, NF4)
    assert "gives no values to " in str(error.value) and str(error.value).endswith(" Load a DCP folder.")
    dcp = f"--checkpoint.initial_load_path={tmp_path}/seed/checkpoint/step-0"
    assert formats_of(_loaded(tmp_path / "2", *model, dcp, NF4)) == {"nf4"}
    _loaded(tmp_path / "3", *in_hf)
    assert "gives no values to 6 weights, " in caplog.text


def test_integers_are_no_weights(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = save(tmp_path / "base", weights | {name: weights[name].to(torch.int32)})
    for form in ("", "nf4"):
        with pytest.raises(ValueError, match=rf"1 keys are no weights: {name} is int32 there"):
            _loaded(tmp_path / "run", *on(base, f"--lora.base_format={form}"))


def test_of_a_folder_that_is_quantized_in_part_all_is_packed_in_one_format_that_holds_its_values(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With double quantisation, but for what its makers found sensitive."""
    stored, linears = dict(weights), linears_of(weights)
    quantized = [name for name in linears if "layers.1." not in name and "down_proj" not in name]
    for name in quantized:
        parts, dense = through_nf4(linears[name].bfloat16(), nested=True)
        stored |= {f"{name}{part}": value for part, value in parts.items()}
        linears[name] = dense
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = save(tmp_path / "base", stored, config)
    run, kept = (_loaded(tmp_path / form, *on(base, form)) for form in (NF4, AS_RELEASED))
    assert formats_of(run) == formats_of(kept) == {"nf4-fp32"}
    ours, theirs, plain = (full_state(each) for each in (run, kept, _loaded(tmp_path / "3", *on(base))))
    packed = {name for name in ours if ours[name].dtype is torch.uint8}
    as_released = {name for name in theirs if theirs[name].dtype is torch.uint8}
    assert (len(packed), len(as_released)) == (len(linears), len(quantized))
    assert all(torch.equal(ours[name], theirs[name]) for name in as_released)
    assert all(torch.equal(theirs[name], plain[name]) for name in packed - as_released)


def _loaded(folder: Path, *options: str):
    run = build(folder, *options)
    try:
        run.trainer.checkpointer.load()
    finally:
        run.trainer.close()
    return run
