"""What a step folder says of itself, and its adapters as PEFT's, read without a training job.

step-N/lora.json    model, flavor, base and the settings of [lora] that the tensors alone do not tell
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from lora_converter.config import LoRAConfig
from lora_converter.linear import LoRALinear
from lora_converter.peft import PeftAdapter
from lora_converter.titan.peft_bridge import linear_shapes, to_peft

DESCRIPTION = "lora.json"


def describe_step(path: str, job_config, base: str | None) -> None:
    """Writes the description into a step folder that is about to be written."""
    lora = {field.name: getattr(job_config.lora, field.name) for field in fields(LoRAConfig)}
    described = {"model": job_config.model.name, "flavor": job_config.model.flavor, "base": base or "", "lora": lora}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def read_step(path: str | Path, *, base: str = "") -> PeftAdapter:
    """The adapters of a step folder in Hugging Face's names.

    Args:
        base: For `base_model_name_or_path`; the run's own base if left out.

    Raises:
        ValueError: It is no complete step folder of a LoRA run.
    """
    path = Path(path)
    if not (path / ".metadata").is_file() or not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path} is no complete step folder of a LoRA run: it lacks .metadata or {DESCRIPTION}.")
    described: dict[str, Any] = json.loads((path / DESCRIPTION).read_text())
    spec = get_train_spec(described["model"])
    if spec.state_dict_adapter is None:
        raise ValueError(f"{path}: {described['model']} has no StateDictAdapter to name Hugging Face's modules by.")
    args = spec.model_args[described["flavor"]]
    args.update_from_config(JobConfig())
    with torch.device("meta"):
        linears = linear_shapes(spec.model_cls(args))
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    names = [f"{fqn}.{name}" for fqn in linears for name in LoRALinear.adapter_parameter_names]
    state_dict = {name: torch.empty(stored[name].size) for name in names if name in stored}  # type: ignore[union-attr]
    dcp.load(state_dict, storage_reader=reader, no_dist=True)
    adapter = spec.state_dict_adapter(args, None)
    config = LoRAConfig(**described["lora"])
    return to_peft(adapter, state_dict, linears, config, base_model=base or described["base"])
