"""Ways to start a job, or a tool on its result, that are refused: what the message says is done, and it runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, TINY, build, full_state, parse, start_process_group, train
from test_checkpoint import RANDOM_BASE
from test_remedies_of_runs import goes_on, same
from test_resume import loaded, on, step
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.models.llama3 import llama3_args

from lora_converter.cli import main
from lora_converter.peft import load_peft
from lora_converter.titan.checkpoint import LoRACheckpointManager
from lora_converter.titan.phases import run_full_phase

pytestmark = pytest.mark.slow

# Two phases


NO_BASE = [RANDOM_BASE, "--checkpoint.no-initial_load_in_hf"]
TWO_PHASES = {
    "entry": (
        [],
        [],
        "torchtitan's own entry trains one phase. Start the job with `torchrun ... -m lora_converter.train`.",
    ),
    "checkpoints": (NO_BASE, ["--checkpoint.no-enable"], "as a checkpoint: set checkpoint.enable = true."),
    "merged": ([], ["--lora.save_merged"], "Leave save_merged at false."),
}


@pytest.mark.parametrize("name", TWO_PHASES)
def test_a_job_of_two_phases_trains_both(name: str, hf_base: Path, tmp_path: Path) -> None:
    """`run_full_phase` is what lora_converter.train does before torchtitan's own main."""
    base, trouble, advice = TWO_PHASES[name]
    job = [*on(hf_base), "--lora.full_phase.steps=2", "--lora.full_phase.lr=1e-3", *base]
    with pytest.raises(ValueError) as error:
        build(tmp_path, *job, *trouble)
    assert advice in str(error.value)
    start_process_group()
    run = goes_on(tmp_path, *job, *run_full_phase(parse(tmp_path, *job)))
    before = full_state(loaded(tmp_path / "base", *on(hf_base), *base))
    moved = [key for key, value in full_state(run).items() if not value.equal(before[key])]
    assert len(run.losses) == 3 and any("lora" in key for key in moved)
    assert sum("lora" not in key for key in moved) > 30


# What torchtitan was before


@pytest.mark.slow
def test_a_device_is_chosen_that_is_there_once_prepare_is_called_first() -> None:
    lines = ["import torchtitan.tools.utils as utils", "from lora_converter.titans import cpu; cpu.prepare()"]
    show = "print(utils.device_type)"
    late, first = (
        subprocess.run([sys.executable, "-c", "\n".join([*order, show])], capture_output=True, text=True, cwd=ROOT)
        for order in (lines, lines[::-1])
    )
    assert "Call prepare() first, or start with `-m lora_converter.train`." in late.stderr
    assert first.stdout.strip() == "cpu", first.stderr


def test_a_checkpointer_of_the_users_derives_from_ours_or_is_torchtitans(
    hf_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manager(parent: type) -> type:
        return type("Mine", (parent,), {})

    advice = "Derive it from lora_converter.titan.checkpoint.LoRACheckpointManager, or use torchtitan's own."
    monkeypatch.setattr("torchtitan.train.CheckpointManager", manager(CheckpointManager))
    with pytest.raises(ValueError, match=f"Mine cannot checkpoint .* {advice}"):
        build(tmp_path, *on(hf_base))
    found = []
    for number, parent in enumerate((manager(LoRACheckpointManager), CheckpointManager)):
        monkeypatch.setattr("torchtitan.train.CheckpointManager", parent)
        trained = goes_on(tmp_path / str(number), *on(hf_base))
        again = loaded(tmp_path / str(number), *on(hf_base))
        assert again.trainer.step == 3 and same(full_state(again), full_state(trained))
        found.append(again)
    assert type(found[0].trainer.checkpointer).__name__ == "Mine" and same(*map(full_state, found))


# Models that the user registers


def test_a_step_of_a_users_model_is_exported_once_its_module_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its module registered is taken away again, as in another process."""
    (tmp_path / "my_flavors.py").write_text(
        "from torchtitan.models.llama3 import TransformerModelArgs, llama3_args\n"
        f"llama3_args['of_mine'] = TransformerModelArgs(**{TINY})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    job = [RANDOM_BASE, "--model.flavor=of_mine", "--experimental.custom_import=my_flavors"]
    run = train(tmp_path / "run", *job)
    description = step(tmp_path / "run", 3) / "lora.json"
    description.write_text(description.read_text().replace('"my_flavors"', '""'))
    del llama3_args["of_mine"], sys.modules["my_flavors"]
    command = ["export", f"--checkpoint={description.parent}", f"--output={tmp_path}/adapter"]
    assert main(command) == 1
    assert "If a module of yours registers it, name it with --import." in capsys.readouterr().err
    assert main([*command, "--import=nothing_of_mine"]) == 1
    told = capsys.readouterr().err
    assert "nothing_of_mine cannot be imported" in told and "Name a module with --import." in told
    assert main([*command, "--import=my_flavors"]) == 0
    a, _ = load_peft(tmp_path / "adapter").factors["model.layers.0.self_attn.v_proj"]
    assert torch.equal(a, full_state(run)["layers.0.attention.wv.lora_a.weight"])
