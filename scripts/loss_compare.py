"""Compares the training losses of one TOML file under several option sets: layouts, ranks, full fine-tuning.

All runs start from one checkpoint (the base that the TOML file names, or a seed checkpoint made here), read one data
order whatever their data-parallel degree, and use the global batch of the TOML file. The first run is the baseline.

    .venv/bin/python scripts/loss_compare.py --config configs/debug_lora.toml --steps 20 \\
        --run "one=" --run "tp2=--parallelism.tensor_parallel_degree=2" --ranks tp2=2 --rtol 1e-5

    # another base than the file's, a random one here: --options="--checkpoint.initial_load_path="
    # ranks 8 and 64 and full fine-tuning: curves, no bound
    .venv/bin/python scripts/loss_compare.py --config configs/debug_lora.toml --run "r8=--lora.rank=8" \\
        --run "r64=--lora.rank=64" --run "full=" --config-of full=configs/debug_base.toml

Writes losses.csv, losses.png and one log per run into --output-folder. Exits 1 if a run differs from the baseline by
more than --rtol/--atol (or at all, with --assert-equal), or from the losses given with --import-result.
"""

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from losses import read_losses

from lora_converter.titan import install

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FIXED_OPTIONS = ["--debug.deterministic", "--debug.seed=42", "--metrics.log_freq=1", "--metrics.enable_tensorboard",
                 "--metrics.disable_color_printing", "--checkpoint.enable"]  # fmt: skip

Losses = dict[int, float]


@dataclass
class Run:
    """One named option set."""

    name: str
    options: list[str]
    config: str
    ranks: int = 1
    losses: Losses = field(default_factory=dict)


def main() -> int:
    args = parse_arguments()
    folder = Path(args.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    install()
    runs = make_runs(args)
    common = shlex.split(args.options)
    start = [] if args.no_seed_checkpoint or has_base(runs[0]) else make_seed_checkpoint(args.config, common, folder)
    steps = [f"--training.steps={args.steps}"] if args.steps else []
    for run in runs:
        options = [*run.options, *steps, *start, "--checkpoint.load_only", *batch_options(run, runs[0])]
        launch(run.config, options, ranks=run.ranks, folder=folder, name=run.name)
        run.losses = read_losses(folder / run.name)

    write_csv(runs, folder / "losses.csv")
    draw(runs, folder / "losses.png")
    tolerance = (0.0, 0.0) if args.assert_equal else (args.rtol, args.atol)
    references = [(run, runs[0].name, runs[0].losses) for run in runs[1:]]
    if args.import_result:
        references += [(run, args.import_result, import_losses(Path(args.import_result))) for run in runs]
    agree = [report(run, name, losses, tolerance) for run, name, losses in references]
    if args.export_result and all(agree):
        export_losses(runs[0].losses, Path(args.export_result))
    print(f"Wrote {folder}/losses.csv and {folder}/losses.png")
    return 0 if all(agree) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="TOML file of all runs")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=OPTIONS", help="an option set; repeat")
    parser.add_argument("--options", default="", help='options of all runs, before their own; write --options="..."')
    parser.add_argument("--ranks", action="append", default=[], metavar="NAME=N", help="ranks of a run (default 1)")
    parser.add_argument("--config-of", action="append", default=[], metavar="NAME=FILE", help="another TOML for a run")
    parser.add_argument("--steps", type=int, help="training steps (default: the TOML file's)")
    parser.add_argument("--output-folder", default="outputs/loss_compare", help="default: %(default)s")
    parser.add_argument("--no-seed-checkpoint", action="store_true", help="let every run initialise its own base")
    parser.add_argument("--assert-equal", action="store_true", help="losses must be equal bit for bit")
    parser.add_argument("--rtol", type=float, default=float("inf"), help="largest relative difference (default: none)")
    parser.add_argument("--atol", type=float, default=0.0, help="absolute difference allowed beside it (default: 0)")
    parser.add_argument("--export-result", default="", metavar="FILE", help="write the baseline's 'step loss' lines")
    parser.add_argument("--import-result", default="", metavar="FILE", help="compare every run with such lines")
    args = parser.parse_args()
    if len(args.run) < 2 and not (args.import_result or args.export_result):
        parser.error("give two or more --run, or --import-result or --export-result.")
    return args


def make_runs(args: argparse.Namespace) -> list[Run]:
    ranks, configs = pairs(args.ranks), pairs(args.config_of)
    common = shlex.split(args.options)
    runs = [Run(name, common + shlex.split(options), args.config) for name, options in pairs(args.run).items()]
    names = [run.name for run in runs]
    if unknown := [name for name in [*ranks, *configs] if name not in names]:
        sys.exit(f"--ranks and --config-of name {', '.join(unknown)}; the runs are {', '.join(names)}.")
    for run in runs:
        run.ranks, run.config = int(ranks.get(run.name, 1)), configs.get(run.name, run.config)
    return runs


def pairs(arguments: list[str]) -> dict[str, str]:
    """["a=1", "b=2"] -> {"a": "1", "b": "2"}."""
    if wrong := [argument for argument in arguments if "=" not in argument or argument.startswith("=")]:
        sys.exit(f"{wrong[0]!r}: write NAME=VALUE.")
    return {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}


def job_config(run: Run):
    """The run's JobConfig as torchtitan parses it."""
    from torchtitan.config import ConfigManager

    return ConfigManager().parse_args(["--job.config_file", run.config, *run.options])


def has_base(run: Run) -> bool:
    checkpoint = job_config(run).checkpoint
    return bool(checkpoint.initial_load_path or checkpoint.initial_load_in_hf)


def batch_options(run: Run, baseline: Run) -> list[str]:
    """Splits the baseline's global batch over the data-parallel ranks of a run."""
    whole = job_config(baseline).training
    rows = whole.global_batch_size if whole.global_batch_size > 0 else whole.local_batch_size
    parallelism = job_config(run).parallelism
    shard = parallelism.data_parallel_shard_degree
    rest = (
        parallelism.tensor_parallel_degree * parallelism.pipeline_parallel_degree * parallelism.context_parallel_degree
    )
    degree = run.ranks // rest if shard < 0 else shard * parallelism.data_parallel_replicate_degree
    if any("training.local_batch_size" in option for option in run.options):
        return [f"--training.global_batch_size={rows}"]
    if rows % degree:
        sys.exit(f"{run.name}: a global batch of {rows} does not split over {degree} data-parallel ranks.")
    return [f"--training.global_batch_size={rows}", f"--training.local_batch_size={rows // degree}"]


def make_seed_checkpoint(config: str, options: list[str], folder: Path) -> list[str]:
    """Initialises the base once, on one rank. Returns the options that start a run from it."""
    shutil.rmtree(folder / "seed", ignore_errors=True)
    seed = ["--checkpoint.create_seed_checkpoint", "--checkpoint.folder=checkpoint"]
    launch(config, [*options, *seed], ranks=1, folder=folder, name="seed")
    return [f"--checkpoint.initial_load_path={folder}/seed/checkpoint/step-0"]


def launch(config: str, options: list[str], *, ranks: int, folder: Path, name: str) -> None:
    """One torchrun of `one_order.py`."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               str(ROOT / "scripts" / "one_order.py"), f"--job.config_file={config}", *FIXED_OPTIONS, *options,
               f"--job.dump_folder={folder / name}"]  # fmt: skip
    print(f"{name}: {ranks} rank{'s' * (ranks > 1)}, {shlex.join(options)}", flush=True)
    for old in (folder / name).rglob("events.out.tfevents.*"):
        old.unlink()
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    env.setdefault("OMP_NUM_THREADS", "1")  # equal in all runs: the order of sums depends on it
    with open(log, "w") as out:
        result = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    if result.returncode:
        # Each rank has its own last words, and the first that failed its ahead of the others'.
        sys.exit(f"{name} failed, see {log}:\n{''.join(log.read_text().splitlines(True)[-400:])}")


def report(run: Run, name: str, expected: Losses, tolerance: tuple[float, float]) -> bool:
    """Prints how far a run is from a reference. Returns whether it is within the tolerance."""
    rtol, atol = tolerance
    if run.losses.keys() != expected.keys():
        print(f"{run.name} against {name}: FAIL, steps {sorted(run.losses)} and {sorted(expected)}")
        return False
    off = {step: abs(run.losses[step] - loss) for step, loss in expected.items()}
    size = {step: max(abs(loss), 1e-12) for step, loss in expected.items()}
    relative = {step: off[step] / size[step] for step in expected}
    agree = all(off[step] <= atol + rtol * size[step] for step in expected)  # a nan is never within
    worst = max(relative, key=lambda step: relative[step])
    verdict = "ok" if agree else "FAIL"
    print(
        f"{run.name} against {name}: {verdict}, max relative difference {relative[worst]:.2e} at step {worst}, "
        f"last loss {list(run.losses.values())[-1]:.5f} and {list(expected.values())[-1]:.5f}"
    )
    return agree


def export_losses(losses: Losses, path: Path) -> None:
    """One `step loss` line a step."""
    path.write_text("".join(f"{step} {loss!r}\n" for step, loss in losses.items()))


def import_losses(path: Path) -> Losses:
    """What `export_losses` wrote."""
    return {int(step): float(loss) for step, loss in (line.split() for line in path.read_text().splitlines() if line)}


def write_csv(runs: list[Run], path: Path) -> None:
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["step", *(run.name for run in runs)])
        for step in sorted(set().union(*(run.losses for run in runs))):
            writer.writerow([step, *(run.losses.get(step, "") for run in runs)])


def draw(runs: list[Run], path: Path) -> None:
    """Curves above, relative differences to the baseline below."""
    figure, (curves, differences) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    baseline = runs[0].losses
    for number, run in enumerate(runs):
        line = "--" if number else "-"  # so that curves that lie on the baseline's leave it to be seen
        curves.plot(list(run.losses), list(run.losses.values()), line, color=f"C{number}", label=run.name)
    for number, run in enumerate(runs[1:], 1):
        common = [step for step in run.losses if step in baseline]
        gap = [abs(run.losses[step] - baseline[step]) / abs(baseline[step]) for step in common]
        differences.plot(common, gap, color=f"C{number}", label=run.name)
    curves.set(ylabel="loss")
    differences.set(xlabel="step", ylabel=f"relative difference to {runs[0].name}", yscale="symlog")
    differences.set_yscale("symlog", linthresh=1e-9)
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    curves.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
