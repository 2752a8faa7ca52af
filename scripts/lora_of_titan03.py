"""torchtitan 0.3's own LoRA beside this package's: the table of docs/torchtitan03.md.

Both on one small Llama and CPU ranks.
.venv-titan03/bin/python scripts/lora_of_titan03.py [FOLDER]

Each job is a launch of its own: whose adapters, which backend, which layout. Two steps on the same text, from a base
that is a DCP folder where it can be loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "FSDP2": {"data_parallel_shard_degree": 2},
    "TP2": {"tensor_parallel_degree": 2},
}
BACKENDS = ("spmd_types", "partial_dtensor")
OWN, OURS = "torchtitan's own", "this package"
THEIR_TARGETS = ["wqkv", "wo", "w1", "w2", "w3"]


def config_of(whose: str, backend: str, layout: str, folder: Path, base: str) -> Any:
    """The job's config."""
    from torchtitan.components.lora import LoRAConverter
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models.llama3 import model_registry
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from lora_converter.titan03 import lora

    config: Any = llama3_debugmodel()
    config.hf_assets_path = str(ROOT / "tests/assets/tokenizer")
    config.dataloader.dataset_path = str(ROOT / "tests/assets/c4_test")
    config.dump_folder = str(folder)
    config.training.seq_len, config.training.steps, config.training.local_batch_size = 256, 2, 4
    config.training.mixed_precision_param, config.training.disable_cuda_graphs = "float32", True
    config.optimizer = default_adamw(lr=1e-3)
    config.optimizer.implementation = "foreach"
    config.activation_checkpoint, config.validator.enable = None, False
    config.debug.seed, config.debug.enable_structured_logging = 0, False
    config.parallelism.spmd_backend = backend
    config.checkpoint.enable, config.checkpoint.interval = True, 1
    config.checkpoint.last_save_in_hf = config.checkpoint.last_save_model_only = whose != "base"
    if base:
        config.checkpoint.initial_load_path = base
    for name, degree in LAYOUTS[layout].items():
        setattr(config.parallelism, name, degree)
    if whose == OWN:
        converter = LoRAConverter.Config(rank=8, alpha=16.0, target_modules=THEIR_TARGETS)
        config.model_spec = model_registry("debugmodel", converters=[converter])
    return lora(config, rank=8, alpha=16.0) if whose == OURS else config


def run_job(result: str, whose: str, backend: str, layout: str, folder: str, base: str) -> None:
    """On each rank: two steps, and what is found out."""
    from lora_converter.titan03.cpu_changes import install

    install()
    import hashlib

    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    config = config_of(whose, backend, layout, Path(folder), base)
    config.__post_init__()
    trainer = config.build()
    digest = hashlib.sha256()
    for name, param in trainer.model_parts[0].named_parameters():
        if ".lora_a." in name:
            whole = param.full_tensor() if isinstance(param, DTensor) else param
            digest.update(whole.detach().numpy().tobytes())
    norms: list[float] = []
    log = trainer.metrics_processor.log

    def record(step: int, loss: float, max_loss: float, grad_norm: float, **kwargs: Any) -> None:
        norms.append(float(grad_norm))
        log(step, loss, max_loss, grad_norm, **kwargs)

    trainer.metrics_processor.log = record
    in_optimizer = sum(len(g["params"]) for o in trainer.optimizers.optimizers for g in o.param_groups)
    trainer.train()
    trainer.close()
    if dist.get_rank() == 0:
        Path(result).write_text(
            json.dumps({"initial": digest.hexdigest()[:8], "norms": norms, "optimizer": in_optimizer})
        )
    torch.distributed.destroy_process_group()


def launch(folder: Path, whose: str, backend: str, layout: str, base: str = "") -> dict[str, Any]:
    """One job; what it found out, or the last line of its error."""
    ranks = 1 if layout == "one rank" else 2
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", __file__, "--job", str(folder / "result.json")]
    done = subprocess.run(
        [*command, whose, backend, layout, str(folder), base],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        return {"error": f"`{errors[-1].split(']:')[-1].strip()}`" if errors else done.stderr[-300:]}
    steps = folder / "checkpoint"
    found = json.loads((folder / "result.json").read_text())
    size = sum(f.stat().st_size for f in (steps / "step-1").rglob("*") if f.is_file())
    return {**found, "bytes": size, "exported": exported_in(steps / "step-2") if (steps / "step-2").is_dir() else []}


def exported_in(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors files."""
    from safetensors import safe_open

    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


def found_of(folder: Path, whose: str, backend: str, base: str) -> list[str]:
    """A column of the table."""
    loaded = launch(folder / "dcp", whose, backend, "one rank", base)
    from_base = "" if "error" in loaded else base
    jobs = [launch(folder / layout.replace(" ", "-"), whose, backend, layout, from_base) for layout in LAYOUTS]
    one, tp = jobs[0], jobs[-1]
    adapters = sum("lora_A" in name or "lora_a" in name for name in one["exported"])
    return [
        str(one["optimizer"]),
        f"{one['bytes'] / 2**20:.1f} MiB",
        ", ".join(job["initial"] for job in jobs),
        loaded.get("error", "loaded"),
        f"{tp['norms'][0] / one['norms'][0]:.6f}" if from_base else "not comparable: random bases differ, too",
        f"{len(one['exported'])} tensors, {adapters} of them adapters' A",
    ]


ROWS = (
    "tensors in the optimizer",
    "a step, with optimizer",
    "digests of initial A on 1 rank, FSDP2, TP2",
    "a base that is a DCP folder",
    "gradient norm of step 1, TP2 / one rank",
    "`last_save_in_hf` writes",
)


def table(folder: Path) -> str:
    """In Markdown."""
    launch(folder / "base", "base", "spmd_types", "one rank")
    base = str(folder / "base/checkpoint/step-1")
    columns = {
        f"{whose}, `{backend}`": found_of(folder / f"{whose.split()[0]}-{backend}", whose, backend, base)
        for whose in (OWN, OURS)
        for backend in BACKENDS
    }
    lines = [["", *columns], ["---"] * (1 + len(columns)), *zip(ROWS, *columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            print(table(Path(sys.argv[1] if len(sys.argv) > 1 else scratch)))
