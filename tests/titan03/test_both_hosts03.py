"""One adapter on both torchtitans: initial values, the base's fingerprint, PEFT directories and step folders."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import global_batch
from jobs03 import ROOT, Run, adapter_state, build, config, feed_global_batches, finish
from peft import PeftModel
from transformers import AutoModelForCausalLM

OTHER = ROOT / ".venv" / "bin" / "python"
"""That of `scripts/test.sh`, with torchtitan 0.2.2."""

needs_other = pytest.mark.skipif(
    not OTHER.exists(), reason="no .venv with torchtitan 0.2.2, which scripts/test.sh makes"
)


def on_022(folder: Path, base: Path, *options: str) -> dict[str, Any]:
    """A job on torchtitan 0.2.2, by a process of its own environment."""
    folder.mkdir(exist_ok=True)
    command = [str(OTHER), str(Path(__file__).parent / "on022.py"), f"{folder}/result.pt", str(folder), str(base)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def on_03(folder: Path, base: Path, settings: dict[str, Any] | None = None, **options: Any) -> Run:
    """The same job on this host."""
    in_hf = dict(checkpoint__initial_load_path=str(base), checkpoint__initial_load_in_hf=True)
    run = build(config(folder, settings, **in_hf, **options))
    feed_global_batches(run)
    load = run.trainer.checkpointer.load

    def load_and_look(step: int = -1) -> bool:
        loaded = load(step)
        run.initial = adapter_state(run)
        return loaded

    run.trainer.checkpointer.load = load_and_look  # type: ignore[method-assign]
    return finish(run)


IN_HF = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")
EXPORTED = dict(training__steps=3, checkpoint__last_save_in_hf=True, checkpoint__last_save_model_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def run03(folder: Path, hf_base: Path) -> Run:
    """Four steps here, of which the third is stored."""
    return on_03(folder / "03", hf_base, training__steps=4, checkpoint__interval=3)


@pytest.fixture(scope="module")
def run022(folder: Path, hf_base: Path) -> dict[str, Any]:
    """The same there."""
    options = ("--training.steps=4", "--checkpoint.interval=3", "--checkpoint.no_last_save_model_only")
    return on_022(folder / "022", hf_base, *options)


@pytest.fixture(scope="module")
def exported(folder: Path, hf_base: Path) -> tuple[Path, Run]:
    """A PEFT directory of three steps here."""
    run = on_03(folder / "peft03", hf_base, **EXPORTED)
    return folder / "peft03" / "checkpoint" / "step-3", run


@needs_other
def test_one_seed_gives_one_adapter_and_a_base_has_one_fingerprint(run03: Run, run022: dict[str, Any]) -> None:
    assert run03.initial.keys() == run022["begun"].keys() and run03.initial
    for name, value in run022["begun"].items():
        assert torch.equal(run03.initial[name], value), name
    assert run03.trainer.checkpointer.run.model.base_fingerprint == run022["fingerprint"] != ""


@needs_other
def test_one_job_has_one_course_on_both(run03: Run, run022: dict[str, Any]) -> None:
    """fp32; attention is FlexAttention here and SDPA there, the loss in chunks here and without logits there."""
    assert run03.losses == pytest.approx(run022["losses"], rel=1e-6)
    assert run03.losses[-1] < run03.losses[0] - 0.01


@needs_other
def test_a_step_of_022_is_gone_on_from_here(
    folder: Path, hf_base: Path, run022: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With its optimizer. Its place in the data is that of another loader's, which is told."""
    shutil.copytree(folder / "022" / "checkpoint" / "step-3", folder / "from022" / "checkpoint" / "step-3")
    run = on_03(folder / "from022", hf_base, training__steps=4)
    assert "They start at their beginning" in caplog.text
    assert run.losses == pytest.approx(run022["losses"][3:], rel=1e-6)
    for name, value in run022["final"].items():
        assert torch.allclose(adapter_state(run)[name], value, rtol=0, atol=1e-5 * value.abs().max().item()), name


@needs_other
def test_a_step_of_this_host_is_gone_on_from_on_022(folder: Path, hf_base: Path, run03: Run) -> None:
    shutil.copytree(folder / "03" / "checkpoint" / "step-3", folder / "from03" / "checkpoint" / "step-3")
    found = on_022(folder / "from03", hf_base, "--training.steps=4")
    assert found["losses"] == pytest.approx(run03.losses[3:], rel=1e-6)


@needs_other
def test_adapters_of_a_step_start_a_run_on_the_other_host(folder: Path, hf_base: Path, run022: dict[str, Any]) -> None:
    start = {"initial_adapter_path": str(folder / "022" / "checkpoint" / "step-3")}
    run = on_03(folder / "started", hf_base, start, training__steps=1)
    there = on_022(folder / "start022", hf_base, f"--lora.initial_adapter_path={start['initial_adapter_path']}")
    assert run.losses[0] == pytest.approx(there["losses"][0], rel=1e-6)
    assert all(torch.equal(run.initial[name], value) for name, value in there["begun"].items())


@needs_other
def test_a_peft_directory_of_either_host_is_taken_by_the_other(
    folder: Path, hf_base: Path, exported: tuple[Path, Run]
) -> None:
    path, run = exported
    there = on_022(folder / "peft022", hf_base, f"--lora.initial_adapter_path={path}", *IN_HF)
    assert there["begun"].keys() == adapter_state(run).keys()
    assert all(torch.equal(adapter_state(run)[name], value) for name, value in there["begun"].items())
    back = on_03(
        folder / "back", hf_base, {"initial_adapter_path": f"{folder}/peft022/checkpoint/step-3"}, training__steps=1
    )
    assert all(torch.equal(back.initial[name], value) for name, value in there["final"].items())


def test_transformers_and_peft_load_what_was_trained(exported: tuple[Path, Run], folder: Path, hf_base: Path) -> None:
    """The loss of a run that starts from the directory is theirs."""
    path, _ = exported
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf_base), path)
    tokens = global_batch(1)  # of the first step
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    run = on_03(folder / "from_peft", hf_base, {"initial_adapter_path": str(path)}, training__steps=1)
    assert run.losses[0] == pytest.approx(theirs, rel=1e-5)  # other kernels
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4


def test_a_step_without_a_base_of_its_own_stores_no_base_weight(folder: Path, run03: Run) -> None:
    step = folder / "03" / "checkpoint" / "step-3"
    stored = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    adapter = sum(value.nbytes for value in adapter_state(run03).values())
    base = sum(param.numel() * 4 for part in run03.trainer.model_parts for param in part.parameters()) - adapter
    assert 3 * adapter < stored < 3 * adapter + base / 2
