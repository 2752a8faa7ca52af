"""All weights first, then adapters on the result, in one job; killed anywhere and launched again."""

import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_job import ForkedJob
from harness import Trainer, build, parse, start_process_group
from torch.distributed.checkpoint import FileSystemReader

from lora_converter.titan.host import log_phase
from lora_converter.titan.job import full_phase_result
from lora_converter.titan.phases import full_phase_config, run_full_phase

TOKENS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
PHASES = ["--checkpoint.initial_load_path=", "--lora.full_phase.steps=4", "--lora.full_phase.lr=1e-3"]


def test_the_model_at_the_switch_is_one_model_and_the_rest_is_fresh(tmp_path: Path) -> None:
    start_process_group()
    config = parse(tmp_path, *PHASES)
    first = Trainer(full_phase_config(config))
    first.train()
    assert {name for name, p in first.model_parts[0].named_parameters() if not p.requires_grad} == set()
    with torch.no_grad():
        before = first.model_parts[0](TOKENS)
    first.close()
    second = build(tmp_path, *PHASES, f"--checkpoint.initial_load_path={full_phase_result(config)}")
    second.trainer.checkpointer.load()
    with torch.no_grad():
        assert torch.equal(second.trainer.model_parts[0](TOKENS), before)
    assert second.trainer.step == 0 and not second.trainer.optimizers.optimizers[0].state
    assert first.lr_schedulers.schedulers[0].base_lrs[0] == 1e-3
    assert second.trainer.lr_schedulers.schedulers[0].base_lrs[0] == 3e-3
    second.trainer.train()
    assert len(second.losses) == 3 and second.losses[-1] != second.losses[0]
    second.trainer.close()


def test_phase_1_begins_at_its_base_although_the_folder_is_claimed_before(dcp_base: Path, tmp_path: Path) -> None:
    """A checkpoint folder that is there already is one that torchtitan resumes from: it reads no base then."""
    start_process_group()
    base = ["--lora.full_phase.steps=1", "--lora.full_phase.lr=1e-30", f"--checkpoint.initial_load_path={dcp_base}"]
    config = parse(tmp_path, *base)
    run_full_phase(config)
    names = {name for name in FileSystemReader(dcp_base).read_metadata().state_dict_metadata if "." in name}
    names &= set(FileSystemReader(full_phase_result(config)).read_metadata().state_dict_metadata)
    assert "layers.0.attention.wq.weight" in names
    before, after = (weights(path, names) for path in (dcp_base, Path(full_phase_result(config))))
    assert all(torch.equal(before[name], after[name]) for name in names)


def weights(path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: torch.empty(stored[name].size) for name in names}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


def test_the_phase_is_in_the_metrics() -> None:
    class Processor:
        def log(self, step: int, extra_metrics: dict | None = None) -> None:
            self.seen = (step, extra_metrics)

    class Run:
        metrics_processor = Processor()

    log_phase(Run, 2)
    Run.metrics_processor.log(5, extra_metrics={"lr": 1.0})
    assert Run.metrics_processor.seen == (5, {"lr": 1.0, "lora/phase": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora.full_phase.steps=3", "--lora.save_merged", "--checkpoint.initial_load_path=/"],
            "lora.save_merged = true with lora.full_phase: the adapters' base is that phase's result, a DCP folder",
        ),
        (
            ["--lora.full_phase.steps=3"],
            "lora.full_phase.steps = 3: torchtitan's own entry trains one phase. Start the",
        ),
        (
            ["--lora.full_phase.steps=3", "--checkpoint.no-enable"],
            "lora.full_phase hands its result on as a checkpoint: set checkpoint.enable = true.",
        ),
        (
            [
                *("--lora.full_phase.steps=3", "--checkpoint.initial_load_path=/", "--checkpoint.initial_load_in_hf"),
                "--parallelism.tensor_parallel_degree=2",
            ],
            "lora.full_phase with checkpoint.initial_load_in_hf = true under FSDP2 x TP: torchtitan 0.2.2 loads",
        ),
    ],
)
def test_a_job_of_two_phases_that_cannot_work_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    from lora_converter.titan.converter import LoRAConverter

    with pytest.raises(ValueError) as error:
        LoRAConverter(parse(tmp_path, "--checkpoint.initial_load_path=", *options), None)
    assert str(error.value).startswith(message)


def test_a_wrong_target_is_told_before_the_first_phase(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules: 'wkv' matches no linear"):
        run_full_phase(parse(tmp_path, *PHASES, "--lora.target_modules=wkv"))
    assert not list(tmp_path.iterdir())


STEPS = 12
EVENTS = ("LoRA: phase", "LoRA: loading", "LoRA: resuming", "step:", "Saving the checkpoint")
"""What the log shows of the job's progress, both phases and the switch between them."""


def a_job(folder: Path, ranks: int, *options: str) -> ForkedJob:
    sizes = [f"--training.local_batch_size={4 // ranks or 1}", "--training.global_batch_size=4", "--lora.rank=4"]
    steps = [f"--training.steps={STEPS}", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0"]
    return ForkedJob(folder, ranks, "debug_lora.toml", [*PHASES, *sizes, *steps, *options])


def train_with_kills(job: ForkedJob, moments: list[int]) -> list[int]:
    """Launches until the job ends by itself; each of the first launches is killed a little after a moment of its own.

    Args:
        moments: Lines of progress, counted from a launch on.

    Returns:
        The phase of each kill.
    """
    rng, killed = random.Random(0), []
    for moment in moments:
        job.launch()
        assert job.wait(lambda text, lines=moment: sum(text.count(event) for event in EVENTS) >= lines)
        killed.append(2 if "phase 2 of 2" in job.text() else 1)
        time.sleep(rng.uniform(0, 0.1))
        job.kill()
    job.run()
    return killed


def adapter_of(job: ForkedJob) -> dict[str, torch.Tensor]:
    path = job.folder / "checkpoint" / f"step-{STEPS}"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name for name in stored if name.endswith((".lora_a.weight", ".lora_b.weight"))]
    found = {name: torch.empty(stored[name].size) for name in names if not name.startswith("optimizer")}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "moments", "options"),
    [
        (1, random.Random(0).choices(range(1, 7), k=12), []),
        (4, [8, 24], ["--parallelism.tensor_parallel_degree=2"]),
    ],
    ids=["1 rank", "FSDP2 x TP2"],
)
def test_killed_anywhere_it_ends_where_it_would_have_ended(
    ranks: int, moments: list[int], options: list[str], tmp_path: Path
) -> None:
    whole, killed = (a_job(tmp_path / name, ranks, *options) for name in ("whole", "killed"))
    whole.run()
    assert set(train_with_kills(killed, moments)) == {1, 2}
    expected, found = adapter_of(whole), adapter_of(killed)
    assert len(expected) == 28 and expected.keys() == found.keys()
    for name, value in expected.items():
        if ranks == 1:
            assert torch.equal(value, found[name]), name
        else:
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=1e-5)
