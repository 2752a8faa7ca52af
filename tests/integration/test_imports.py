"""What a launch imports: a start of a small job is nearly all imports, so ours are told apart from the host's."""

import json
import os
import subprocess
import sys
from pathlib import Path

from harness import CONFIG, ROOT

BEYOND_THE_HOST = {
    "lora_converter": "itself",
    "safetensors": "bases and PEFT directories; the host imports it once it reads a Hugging Face folder",
    "typeguard": "tyro's, for the host's command line",
}
"""Top-level module -> why a LoRA job has it, and `import torchtitan.train` has not."""

JOB = [
    f"--job.config_file={CONFIG}",
    f"--model.hf_assets_path={ROOT}/tests/assets/tokenizer",
    f"--training.dataset_path={ROOT}/tests/assets/c4_test",
    "--checkpoint.initial_load_path=",
    "--training.local_batch_size=1",
    "--training.seq_len=64",
    "--training.steps=1",
]


def modules_after(code: str, *args: str) -> set[str]:
    rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    env = dict(os.environ, PYTHONPATH=str(ROOT), **rank)
    run = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_a_job_imports_nothing_that_it_has_no_use_for(tmp_path: Path) -> None:
    """No transformers, peft or datasets of ours: from the launch to the saved step."""
    host = modules_after("import torchtitan.train")
    job = modules_after("from lora_converter.train import main; main()", *JOB, f"--job.dump_folder={tmp_path}")
    assert (tmp_path / "checkpoint" / "step-1" / "lora.json").exists()
    assert job - host == BEYOND_THE_HOST.keys()
