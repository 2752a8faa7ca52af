"""Two gloo ranks: packed linears under FSDP2 and TP compute what they compute on one rank."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import packed_experts
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from launch import main
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, disable_adapter
from lora_converter.adapted import adapted_modules
from lora_converter.packed_linear import pack_linear
from lora_converter.tensor_parallel import mark_partial_gradients, sum_partial_gradients

WIDTH, HIDDEN = 256, 384


class Block(nn.Module):
    """A linear that every rank has whole under TP, one by rows and one by columns. The biases are of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(self.whole(x))))


def make(form: str, *, adapted: bool) -> Block:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    for name, linear in list(block.named_children()):
        pack_linear(linear, form=form, fqn=name)
    if adapted:
        apply_lora(block, LoRAConfig(rank=4, alpha=8))
        for param in adapter_parameters(block).values():
            nn.init.normal_(param, std=0.1)
    return block


class Whole(ParallelStyle):
    """As torchtitan's NoParallel: parameters are there whole on every rank, inputs and outputs lie as they come."""

    def __init__(self, layout: Placement, *, local: bool) -> None:
        super().__init__()
        self.layout, self.local = layout, local

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def given(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            (x,) = inputs
            return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.layout], run_check=False)

        def gives(module: nn.Module, out: DTensor, mesh: DeviceMesh) -> torch.Tensor:
            assert out.placements == (self.layout,)
            return out.to_local() if self.local else out

        return distribute_module(module, mesh, None, given, gives)


def split_by_rows(block: Block, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Over a mesh, with the rows of activations whole, or sharded along the sequence between the linears."""
    layout: Placement = Shard(1) if sequence else Replicate()
    plan = {
        "whole": Whole(layout, local=not sequence),
        "up": ColwiseParallel(input_layouts=layout, use_local_output=not sequence),
        "down": RowwiseParallel(output_layouts=layout, use_local_output=not sequence),
    }
    parallelize_module(block, mesh, plan)


def forward(block: Block, x: torch.Tensor, mesh: DeviceMesh | None, *, sequence: bool) -> torch.Tensor:
    if not sequence or mesh is None:
        return block(x)
    out = block(DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)]))
    return out.full_tensor()


def results(block: Block, x: torch.Tensor, mesh: DeviceMesh | None = None, *, sequence: bool = False) -> dict[str, Any]:
    """Output and all gradients, whole."""
    x = x.clone().requires_grad_()
    out = forward(block, x, mesh, sequence=sequence)
    out.square().sum().backward()
    if any(True for _ in adapted_modules(block)):
        mark_partial_gradients(block)
        sum_partial_gradients(block.parameters())
    found = {name: param.grad for name, param in block.named_parameters() if param.requires_grad}
    found |= {"out": out.detach(), "x": x.grad}
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())
    assert worst < 1e-6, {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    return worst


X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))


def tensor_parallel(folder: Path, *, form: str, adapted: bool, sequence: bool) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    one, two = make(form, adapted=adapted), make(form, adapted=adapted)
    whole = {name: linear.weight.clone() for name, linear in two.named_children()}
    split_by_rows(two, mesh, sequence=sequence)
    for name, dim in (("up", 0), ("down", 1)):
        weight, parts = two.get_submodule(name).weight, whole[name].chunk(2, dim)
        assert torch.equal(weight.to_local(), parts[mesh.get_local_rank()])
    difference = compare(results(two, X, mesh, sequence=sequence), results(one, X))
    for x in columns_and_sums(mesh) if not (sequence or adapted) else ():
        compare({"out": two.whole(x)}, {"out": one.whole(X)})
    if adapted:
        with torch.no_grad(), disable_adapter(two), disable_adapter(one):
            out = forward(two, X, mesh, sequence=sequence)
            compare({"out": out}, {"out": one(X)})
    return {"difference": difference}


def columns_and_sums(mesh: DeviceMesh) -> list[DTensor]:
    """X in the placements in which no rank has whole rows of it."""
    part = X.chunk(2, -1)[mesh.get_local_rank()]
    return [DTensor.from_local(part, mesh, [Shard(2)]), DTensor.from_local(X / 2, mesh, [Partial()])]


def compiled(folder: Path, *, sequence: bool) -> dict[str, float]:
    """Without Inductor: what is traced, and what the partitioner makes of it."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    one, two = make("nf4", adapted=True), make("nf4", adapted=True)
    split_by_rows(two, mesh, sequence=sequence)
    expected = results(one, X)
    two.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    return {"difference": compare(results(two, X, mesh, sequence=sequence), expected)}


def fsdp2(folder: Path, *, form: str, adapted: bool) -> dict[str, float]:
    one, two, rank = make(form, adapted=adapted), make(form, adapted=adapted), dist.get_rank()
    fully_shard(two)
    assert two.up.weight.to_local().shape[0] == HIDDEN // 2 and two.up.weight.to_local().dtype is torch.uint8
    found, expected = results(two, X[rank : rank + 1]), results(one, X)
    found |= {name: value * 2 for name, value in found.items() if name in dict(two.named_parameters())}  # a mean
    return {"difference": compare(found, {**expected, "out": expected["out"][[rank]], "x": expected["x"][[rank]]})}


def in_bf16(folder: Path) -> None:
    """The packed bytes are gathered as they are beside adapters that are cast."""
    one, two = make("nf4", adapted=True), make("nf4", adapted=True)
    fully_shard(two, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen: list[torch.dtype] = []
    two.up.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    out = two(X)
    assert out.dtype is torch.bfloat16 and seen == [torch.uint8]
    assert (out - one(X)).norm() < 2e-2 * out.norm()


def refused(folder: Path) -> None:
    """Three blocks for two ranks, before anything is computed; a degree that is named is taken after that."""
    mesh, linear = init_device_mesh("cpu", (2,)), nn.Linear(192, 64)
    pack_linear(linear, form="nf4", fqn="layers.0.w2")
    try:
        parallelize_module(linear, mesh, RowwiseParallel())
    except ValueError as error:
        assert str(error) == (
            "layers.0.w2.weight is packed (nf4): its 192 columns are 3 blocks of 64, "
            "which tensor parallelism of 2 does not divide. Degrees that do: 1, 3."
        ), error
    else:
        raise AssertionError("accepted")
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
    parallelize_module(linear, alone, RowwiseParallel())
    assert linear(torch.ones(2, 192)).shape == (2, 64)


CHECKS: dict[str, Callable[[Path], Any]] = {
    **packed_experts.CHECKS,  # in one launch
    "packed linears under FSDP2 in bf16 stay packed": in_bf16,
    "adapters on packed linears under TP2, compiled": partial(compiled, sequence=False),
    "packed columns that a rank cannot have whole blocks of are refused": refused,
}
for _adapted, _kind in ((False, "packed linears"), (True, "adapters on packed linears")):
    CHECKS[f"{_kind} under FSDP2"] = partial(fsdp2, form="nf4", adapted=_adapted)
    for _form, _sequence in (("nf4", False), ("nf4", True), ("mxfp4", False)):
        CHECKS[f"{_kind} under TP2{' with sequence parallelism' * _sequence}, {_form}"] = partial(
            tensor_parallel, form=_form, adapted=_adapted, sequence=_sequence
        )

if __name__ == "__main__":
    main(CHECKS)
