"""Two gloo ranks: packed routed experts under torchtitan's plans and FSDP2 compute what they compute on one rank."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import install
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torchtitan.distributed.expert_parallel import ExpertParallel, ExpertTensorParallel, TensorParallel
from torchtitan.models.gpt_oss.infra.expert_parallel import GptossTensorParallel
from torchtitan.models.gpt_oss.model.moe import GptOssGroupedExperts
from torchtitan.models.moe.moe import GroupedExperts

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, disable_adapter
from lora_converter.adapters import freeze_base
from lora_converter.experts import pack_experts
from lora_converter.tensor_parallel import mark_partial_gradients, sum_partial_gradients
from lora_converter.titan.experts import EXPERT_CLASSES

EXPERTS, DIM, HIDDEN = 4, 128, 256
OF_ROWS = ("out", "base", "x")
ROWS, COUNTS = 24, [[8, 0, 13, 3], [1, 15, 0, 8]]
X = torch.randn(2, ROWS, DIM, generator=torch.Generator().manual_seed(1))
MAKERS: dict[str, Any] = {
    "GroupedExperts": partial(GroupedExperts, DIM, HIDDEN, EXPERTS),
    "gpt_oss": partial(GptOssGroupedExperts, DIM, HIDDEN, EXPERTS, 7.0),
}
TENSOR_PARALLEL: dict[str, type[ParallelStyle]] = {"GroupedExperts": TensorParallel, "gpt_oss": GptossTensorParallel}


def make(which: str, *, grouped: bool, adapted: bool) -> nn.ModuleDict:
    install()
    experts = MAKERS[which](use_grouped_mm=grouped)
    model = nn.ModuleDict({"experts": experts}).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for param in experts.parameters():
        param.normal_(std=0.1, generator=generator)
    pack_experts(experts, EXPERT_CLASSES[type(experts)], form="mxfp4", fqn="layers.0.moe.experts")
    if adapted:
        apply_lora(model, LoRAConfig(rank=2, target_modules=["experts"]), expert_classes=EXPERT_CLASSES)
        for param in adapter_parameters(model).values():
            nn.init.normal_(param, std=0.1, generator=generator)
    return model


def forward(model: nn.ModuleDict, x: torch.Tensor, rank: int, mesh: DeviceMesh | None) -> torch.Tensor:
    """Of a rank's rows; over a mesh outputs are partial sums."""
    out = model["experts"](x, torch.tensor(COUNTS[rank]))
    if mesh is None:
        return out
    return DTensor.from_local(out, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def results(model: nn.ModuleDict, rank: int, mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
    """Outputs with and without adapters, and gradients, whole, of a rank's rows."""
    freeze_base(model)  # plans thaw biases
    x = X[rank].clone().requires_grad_()
    out = forward(model, x, rank, mesh)
    out.float().square().sum().backward()
    mark_partial_gradients(model)
    sum_partial_gradients(model.parameters())
    found: dict[str, Any] = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    found |= {"out": out.detach(), "x": x.grad}
    if len(found) > 2:
        with torch.no_grad(), disable_adapter(model):
            found["base"] = forward(model, x, rank, mesh)
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}


def compare(found: dict[str, Any], expected: dict[str, Any], *, grouped: bool) -> float:
    differences = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert found.keys() == expected.keys()
    # The grouped path computes in bf16.
    assert max(differences.values()) < (1e-2 if grouped else 1e-6), differences
    return max(differences.values())


def of_both(which: str, **settings: bool) -> dict[str, torch.Tensor]:
    """On one rank: this rank's output, and the adapters' gradients of both ranks' rows."""
    mine, others = (results(make(which, **settings), rank) for rank in (dist.get_rank(), 1 - dist.get_rank()))
    return {name: value if name in OF_ROWS else value + others[name] for name, value in mine.items()}


def expert_parallel(folder: Path, *, which: str, grouped: bool, adapted: bool) -> float:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = make(which, grouped=grouped, adapted=adapted)
    parallelize_module(model["experts"], mesh, ExpertParallel())
    check_places(model, mesh, dim=0)
    expected = of_both(which, grouped=grouped, adapted=adapted)
    return compare(results(model, dist.get_rank()), expected, grouped=grouped)


def tensor_parallel(folder: Path, *, which: str, grouped: bool, adapted: bool) -> float:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = make(which, grouped=grouped, adapted=adapted)
    parallelize_module(model["experts"], mesh, TENSOR_PARALLEL[which]())
    check_places(model, mesh, dim=1)
    expected = results(make(which, grouped=grouped, adapted=adapted), 0)
    return compare(results(model, 0, mesh), expected, grouped=grouped)


def expert_tensor_parallel(folder: Path) -> float:
    """A mesh of two dims, which torchtitan's plan places each weight on."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep", "etp"))
    model = make("GroupedExperts", grouped=False, adapted=True)
    parallelize_module(model["experts"], mesh, ExpertTensorParallel())
    assert [p.dim for p in model["experts"].w2.placements] == [0, 2]
    expected = results(make("GroupedExperts", grouped=False, adapted=True), 0)
    return compare(results(model, 0, mesh["etp"]), expected, grouped=False)


def check_places(model: nn.ModuleDict, mesh: DeviceMesh, *, dim: int) -> None:
    """The first weight is cut along a dim, and bytes do not train."""
    experts = model["experts"]
    name = experts.expert_weights[0]
    whole = make("gpt_oss" if "mlp1" in name else "GroupedExperts", grouped=False, adapted=False)["experts"]
    part, weight = whole.get_parameter(name).chunk(2, dim)[mesh.get_local_rank()], experts.get_parameter(name)
    assert torch.equal(weight.to_local(), part) and weight.dtype is torch.uint8 and not weight.requires_grad


def fsdp2(folder: Path, *, which: str, grouped: bool, adapted: bool) -> float:
    model = make(which, grouped=grouped, adapted=adapted)
    fully_shard(model["experts"])
    found, expected = results(model, dist.get_rank()), of_both(which, grouped=grouped, adapted=adapted)
    found |= {name: value * 2 for name, value in found.items() if name not in OF_ROWS}  # a mean
    return compare(found, expected, grouped=grouped)


def refused(folder: Path) -> None:
    """Three blocks for two ranks, before anything is computed."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    experts = GroupedExperts(DIM, 96, EXPERTS, use_grouped_mm=False)
    for param in experts.parameters():
        nn.init.zeros_(param)
    pack_experts(experts, EXPERT_CLASSES[GroupedExperts], form="mxfp4", fqn="layers.0.moe.experts")
    try:
        parallelize_module(experts, mesh, TensorParallel())
    except ValueError as error:
        assert str(error).startswith("layers.0.moe.experts.w2 is packed (mxfp4): its 96 columns are 3 blocks of 32")
    else:
        raise AssertionError("accepted")


CHECKS: dict[str, Callable[[Path], Any]] = {
    "adapters on packed experts under ETP2": expert_tensor_parallel,
    "packed experts whose blocks a rank cannot have whole are refused": refused,
}
for _adapted, _kind in ((False, "packed experts"), (True, "adapters on packed experts")):
    for _which in MAKERS:
        for _grouped, _path in ((False, "loop"), (True, "grouped")):
            _settings: dict[str, Any] = dict(which=_which, grouped=_grouped, adapted=_adapted)
            for _name, _check in (("EP2", expert_parallel), ("TP2", tensor_parallel), ("FSDP2", fsdp2)):
                CHECKS[f"{_kind} under {_name}, {_which}, {_path}"] = partial(_check, **_settings)
