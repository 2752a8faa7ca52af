"""What each rank reads of a Hugging Face base, by the slices that it asks safetensors for, and what it gets."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors
import torch
import torch.nn as nn
from harness import build
from hf_models import HF_MODELS
from launch import main
from parity import EP2, FSDP2, PP2, REPLICATE2, TP2
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lora_converter.dcp.states import ModelSubset
from lora_converter.dcp.twins import Twins
from lora_converter.hf.base import HuggingFaceBase
from lora_converter.ranks import on_first_rank
from lora_converter.tensors import full_tensor, local_part


class _Counted:
    """An open safetensors file, or a slice in it, that counts the bytes of what is read of it."""

    def __init__(self, opened: Any, read: Counter[str], name: str = ""):
        self._opened, self._read, self._name = opened, read, name

    def __enter__(self) -> "_Counted":
        return _Counted(self._opened.__enter__(), self._read)

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def get_slice(self, name: str) -> "_Counted":
        return _Counted(self._opened.get_slice(name), self._read, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._count(name, self._opened.get_tensor(name))

    def __getitem__(self, slices: Any) -> torch.Tensor:
        return self._count(self._name, self._opened[slices])

    def _count(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._read[name] += tensor.nbytes
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Stored weight -> bytes that this rank reads of it."""
    read: Counter[str] = Counter()
    real = safetensors.safe_open
    with mock.patch.object(safetensors, "safe_open", lambda *a, **k: _Counted(real(*a, **k), read)):
        yield read


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def each_rank_reads_its_part(model: str, layout: list[str], folder: Path) -> dict[str, int]:
    """No byte twice and none that it does not keep; the values are those that the adapter makes of whole tensors."""
    base = folder.parents[1] / model
    assert len(list(base.glob("*.safetensors"))) > 1
    options = [*HF_MODELS[model].options, f"--checkpoint.initial_load_path={base}", "--checkpoint.initial_load_in_hf"]
    run = build(folder, *options, *layout)
    with counted() as read:
        run.trainer.checkpointer.load()
    loaded, adapter = run.trainer.checkpointer.run.model.base.state_dict(), run.trainer.checkpointer.sd_adapter
    stored = read_folder(base)
    # A fresh one: they remember the layouts of what they have been given.
    expected = type(adapter)(adapter.model_args, None).from_hf(dict(stored))
    alone = {name for name in loaded if name not in expected}
    assert all(model == "llama4" and name.endswith("expert_bias") for name in alone), alone  # which it has not there
    loaded = {name: value for name, value in loaded.items() if name in expected}
    assert [name for name, value in loaded.items() if not torch.equal(full_tensor(value), expected[name])] == []
    kept = sum(local_part(value).nbytes for value in loaded.values())  # fp32 here and there
    assert sum(read.values()) == kept < 0.65 * sum(value.nbytes for value in stored.values()), (kept, read)
    run.trainer.close()
    return {"read": sum(read.values()), "kept": kept}


class Adapter:
    """A host's StateDictAdapter that does to each weight what its name says."""

    hf_assets_path = None
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, w in state_dict.items():
            match name:
                case "qkv":
                    found |= {f"{n}_proj.weight": part for n, part in zip("qkv", w.split([6, 4, 2]), strict=True)}
                case "interleaved":
                    found |= {"gate.weight": w[::2], "up.weight": w[1::2]}
                case "columns":
                    found["columns"] = w[:, self.order]
                case "bias":
                    found["bias"] = w.view(2, 3, 2).transpose(1, 2).reshape(12).clone()
                case "experts":
                    found |= {f"experts.{e}.weight": part.squeeze(0) for e, part in enumerate(w.split(1))}
                case "transposed_experts":
                    found["transposed_experts"] = w.transpose(-1, -2)
                case "gate" | "up":
                    found["gate_up"] = torch.cat([state_dict["gate"].mT, state_dict["up"].mT], -1)
                case "squared":
                    found["squared"] = w.flatten().roll(1).view_as(w)
                case _:
                    found[name] = w
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {n: w.flatten().roll(-1).view_as(w) if n == "squared" else w for n, w in hf_state_dict.items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(path)


SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("qkv", "interleaved", "columns", "renamed", "squared"), (12, 10)),
    "bias": (12,),
    "experts": (3, 12, 10),
    "transposed_experts": (3, 12, 10),
    "gate": (3, 12, 10),
    "up": (3, 8, 10),
}


def whatever_an_adapter_does(folder: Path) -> None:
    """Split, stacked, reordered and transposed weights, on shards of each dim, uneven ones too, and unsharded."""
    torch.manual_seed(0)
    full = {name: torch.randn(shape) for name, shape in SHAPES.items()}

    def write() -> None:
        folder.mkdir()
        stored = {name: value.contiguous() for name, value in Adapter().to_hf(full).items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    on_first_rank(write)
    mesh = init_device_mesh("cpu", (2,))
    for placement in (None, Replicate(), Shard(0), Shard(1), Shard(2)):
        model = nn.ParameterDict()
        for name, value in full.items():
            fits = placement is not None and (not placement.is_shard() or placement.dim < value.ndim)
            zeros = torch.zeros_like(value)
            model[name] = distribute_tensor(zeros, mesh, [placement if fits else Replicate()]) if placement else zeros
        subset = ModelSubset([model])
        base = HuggingFaceBase(Adapter(), str(folder), Twins(subset, {}), quantized=False)
        with torch.no_grad(), counted() as read:
            base.check()
            base.load()
        loaded = subset.state_dict()
        wrong = [name for name, value in full.items() if not torch.equal(full_tensor(loaded[name]), value)]
        assert wrong == [], (placement, wrong)
        whole = "squared" if placement else ""  # mixes rows and columns; unsharded it is the adapter's own
        kept = sum(local_part(value).nbytes for name, value in loaded.items() if name != whole)
        assert sum(read.values()) - read[whole] == kept, (placement, kept, read)


LAYOUTS = {
    2: {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2, "EP2": [*FSDP2, *EP2]},
    4: {"HSDP 2x2": [*REPLICATE2, *FSDP2], "TP2 x FSDP2": [*TP2, *FSDP2]},
}
MODELS = ("llama3", "qwen3", "deepseek_v3", "llama4")
NONE = {("qwen3", "PP2"), ("qwen3", "EP2"), ("llama3", "EP2")}
"""torchtitan has no pipelines of qwen3, and these have no experts."""

CHECKS: dict[int, dict[str, Callable[[Path], Any]]] = {
    ranks: {
        f"{model}, {name}": partial(each_rank_reads_its_part, model, layout)
        for model in MODELS
        for name, layout in layouts.items()
        if (model, name) not in NONE
    }
    for ranks, layouts in LAYOUTS.items()
}
CHECKS[2]["whatever an adapter does"] = whatever_an_adapter_does

if __name__ == "__main__":
    main({name: check for checks in CHECKS.values() for name, check in checks.items()})
