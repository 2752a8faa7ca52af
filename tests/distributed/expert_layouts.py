"""Adapted experts on gloo ranks: which collectives run, merging on sharded weights and how much of it is in memory,
increments for plain models, PEFT directories, and steps that move between degrees of expert parallelism.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from collectives import Collectives, forward_and_backward, trainer
from expert_export import export
from harness import BASE_CONFIG, build, full_state
from launch import main
from memory import Made
from parity import EP2, EXPERTS_TOO, FSDP2, PP2, TP2, fill_b, row
from reshard import HALF, resume, save
from tiny_models import base_options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torchtitan.models.moe.moe import GroupedExperts

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    apply_lora,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from lora_converter.adapted import adapted_modules
from lora_converter.experts import LoRAExperts
from lora_converter.fingerprint import base_fingerprint
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE
from lora_converter.sync import IncrementReceiver, pack
from lora_converter.tensors import local_part, reshard
from lora_converter.titan.experts import EXPERT_CLASSES
from lora_converter.updates import add_updates

SAVED = "saved experts"
MODEL = "deepseek_v3"
EXPERT_WEIGHTS = [f"layers.{layer}.moe.experts.{weight}" for layer in (1, 2) for weight in ("w1", "w2", "w3")]
TOKENS = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))

SAVED_ON = {
    "1 rank": row(1, model=MODEL, job=EXPERTS_TOO),
    "FSDP2": row(2, FSDP2, model=MODEL, job=EXPERTS_TOO),
    "EP2": row(2, FSDP2, EP2, model=MODEL, job=EXPERTS_TOO),
    "TP2": row(2, TP2, model=MODEL, job=EXPERTS_TOO),
}
REFERENCE = SAVED_ON["1 rank"].one_rank

EXPORTED_FROM = {"EP2": [*FSDP2, *EP2], "TP2": TP2, "FSDP2": FSDP2, "PP2": PP2}


def same_collectives(folder: Path, *layout: str, of_activations: tuple[str, ...] = ()) -> Any:
    """Experts with adapters send what experts without them send.

    Args:
        of_activations: Collectives to compare; all of them if left out. FSDP2 has the adapters' parameters in its own.
    """
    options = [*base_options(MODEL, folder.parent.parent), *layout]
    with trainer(folder / "lora", *options, *EXPERTS_TOO) as run:
        seen = forward_and_backward(run).counts
    with trainer(folder / "base", *options, config=BASE_CONFIG) as run:
        without = forward_and_backward(run).counts
    if of_activations:
        seen, without = ({k: n for k, n in counts.items() if k[0] in of_activations} for counts in (seen, without))
    assert without and seen == without, (seen, without)
    return {f"{name} {size}": count for (name, size), count in seen.items()}


def merging(folder: Path, *layout: str) -> dict[str, float]:
    """Merged experts give the output of base and update; taken back, the base is what it was, bit for bit."""
    options = [*base_options(MODEL, folder.parent.parent), *layout, *EXPERTS_TOO]
    with trainer(folder, *options) as run, torch.no_grad():
        fill_b(run)
        model = run.trainer.model_parts[0]
        experts = [module for module in adapted_modules(model) if isinstance(module, LoRAExperts)]
        assert len(experts) == 2
        before, out = full_state(run), whole(model(TOKENS))
        reshard(model)
        figures = one_expert_at_a_time(experts)
        all_ranks_refuse_what_one_finds(model, experts[1])
        assert same(full_state(run), before)
        merge_adapter(model)
        merged = full_state(run)
        difference = (whole(model(TOKENS)) - out).abs().max().item()
        assert difference < 1e-4 * out.abs().max().item(), difference
        changed = {name for name in before if not torch.equal(before[name], merged[name])}
        assert set(EXPERT_WEIGHTS) <= changed
        unmerge_adapter(model)
        assert same(full_state(run), before)
        merge_and_unload(model)
        assert same({name: whole(value) for name, value in model.state_dict().items()}, {n: merged[n] for n in changed})
    return {**figures, "difference": difference}


def one_expert_at_a_time(experts: list[LoRAExperts]) -> dict[str, float]:
    """A merge gathers nothing, and makes nothing larger than this rank's part of an expert's matrix, or of a factor."""
    shares = {}
    for module in experts:
        for name in module.merged_names():
            part = local_part(module.get_parameter(name))
            whole_update, piece = module.get_parameter(name).numel(), part[:1].numel()
            factors = [local_part(module.get_parameter(f"{name}_lora_{half}")).numel() for half in "ab"]
            with Collectives() as seen, Made(*module.parameters()) as made:
                assert add_updates(part, module.local_updates(name))
            assert not seen.counts, seen.counts
            assert made.largest <= max(piece, *factors) < whole_update, (name, made.largest, piece, factors)
            assert made.peak <= 4 * (5 * piece + sum(factors)), (name, made.peak, piece, factors)
            shares[f"{name}, of the whole update"] = made.largest / whole_update
    return shares


def merging_by_features(folder: Path) -> dict[str, int]:
    """FSDP2 that shards experts by features, as where they are fewer than ranks: A alone is gathered."""
    one, two = (
        nn.ModuleDict({"experts": GroupedExperts(dim=32, hidden_dim=48, num_experts=3, use_grouped_mm=False)})
        for _ in range(2)
    )
    targets = ["experts.w1", "experts.w2"]
    for model in (one, two):
        apply_lora(model, LoRAConfig(rank=2, target_modules=targets), expert_classes=EXPERT_CLASSES)
        for number, param in enumerate(model.parameters()):
            param.data.normal_(generator=torch.Generator().manual_seed(number))
    fully_shard(two["experts"], mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda param: Shard(1))
    with Collectives() as seen:
        merge_adapter(two)
    gathered = seen.elements("all_gather_into_tensor")
    factors = [param.numel() for name, param in adapter_parameters(one).items() if name.endswith("lora_a")]
    assert gathered == sum(factors) // 2, seen.counts  # its input
    merge_adapter(one)
    for name, value in one.named_parameters():
        torch.testing.assert_close(whole(two.get_parameter(name).detach()), value.detach())
    return {"gathered": gathered}


def all_ranks_refuse_what_one_finds(model: nn.Module, module: LoRAExperts) -> None:
    """nan in what the last rank alone holds, of the experts or of the features."""
    factor = local_part(module.get_parameter("w1_lora_b"))
    there = factor.clone()
    if dist.get_rank() == dist.get_world_size() - 1:
        factor[-1, -1, -1] = torch.nan
    for way in (merge_adapter, merge_and_unload):
        try:
            way(model)
        except ValueError as error:
            assert f"{module.lora_fqn}.w1 would hold nan or inf" in str(error), error
        else:
            raise AssertionError("merged")
    factor.copy_(there)


def increments(folder: Path) -> dict[str, float]:
    """From EP2 to plain models on other layouts: what merging gives, and no drift."""
    base = base_options(MODEL, folder.parent.parent)
    packages, merged = [], []
    with trainer(folder / "sender", *base, *FSDP2, *EP2, *EXPERTS_TOO) as run, torch.no_grad():
        model = run.trainer.model_parts[0]
        fingerprint = base_fingerprint(model)
        for version in range(2):
            fill_b(run)
            for param in adapter_parameters(model).values():
                param.mul_(1 + version)
            packages.append(pack(model, version=version, base=fingerprint))
            merge_adapter(model)
            merged.append(full_state(run))
            unmerge_adapter(model)
    figures = {}
    for name, layout in {"EP2": [*FSDP2, *EP2], "TP2": TP2, "FSDP2": FSDP2}.items():
        with trainer(folder / name, *base, *layout, config=BASE_CONFIG) as run, torch.no_grad():
            model = run.trainer.model_parts[0]
            receiver = IncrementReceiver(model)
            for version, package in enumerate(packages):
                receiver.receive(package)
                found = {name: whole(value).clone() for name, value in model.state_dict().items()}
                far = {weight: relative_norm(value, merged[version][weight]) for weight, value in found.items()}
                figures[f"{name} {version}"] = max(far.values())
            for weight, original in receiver._originals.items():
                local_part(model.get_parameter(weight)).copy_(original)
            IncrementReceiver(model).receive(packages[1])
            assert same({name: whole(value) for name, value in model.state_dict().items()}, found)
    # fp32: a product's sums over the rank in another order, where a rank has other rows.
    assert max(figures.values()) < 1e-6, figures
    return figures


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def to_peft_and_back(layout: str, bases: Path) -> None:
    """What one rank trained goes to PEFT from any layout as from one rank, and comes back to it."""
    folder = bases / "experts in PEFT" / layout
    job = [*base_options(MODEL, bases), *EXPORTED_FROM[layout]]
    step = bases / SAVED / "1 rank" / "checkpoint" / f"step-{HALF}"
    for source, options in ((step, EXPERTS_TOO), (folder / "first", ("--lora.rank=16",))):
        run = build(folder / "run", *job, *options, f"--lora.initial_adapter_path={source}")
        run.trainer.checkpointer.load()
        target = folder / ("first" if source == step else "second")
        run.trainer.checkpointer.run.write_peft(str(target))
        dist.barrier()  # only rank 0 writes, and nobody waits for it
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            assert (target / file).read_bytes() == (bases / "experts in PEFT" / "1 rank" / file).read_bytes(), target
        run.trainer.close()


def checks(bases: Path, ranks: int) -> dict[str, Any]:
    """Those of so many ranks: all saves before all resumes."""
    found: dict[str, Any] = {}
    if ranks == 2:
        found["the collectives under TP are those without adapters"] = lambda f: same_collectives(f, *TP2)
        found["what EP sends to experts is what it sends without adapters"] = lambda f: same_collectives(
            f, *FSDP2, *EP2, of_activations=("all_to_all_single", "alltoall_base_")
        )
        for name, layout in {"EP2": [*FSDP2, *EP2], "TP2": TP2, "FSDP2": FSDP2}.items():
            found[f"merging under {name}"] = lambda f, layout=layout: merging(f, *layout)
        for name in EXPORTED_FROM:
            found[f"PEFT from {name}"] = lambda _, layout=name: to_peft_and_back(layout, bases)
        found["merging by features"] = merging_by_features
        found["increments reach plain models on other layouts"] = increments
        for layout, dtype in (("ep", torch.float32), ("pp", torch.float32), ("ep", torch.bfloat16)):
            name = f"an export of Qwen3-30B-A3B's sizes in {dtype} over {layout}"
            found[name] = lambda f, layout=layout, dtype=dtype: export(f, layout, dtype)
    here = {layout: needs for layout, needs in SAVED_ON.items() if needs.ranks == ranks}
    for layout, needs in here.items():
        folder = bases / SAVED / layout
        found[f"save on {layout}"] = lambda _, row=needs, f=folder: save(row, f, bases)
    for layout, needs in here.items():
        for saved in SAVED_ON:
            folder = bases / SAVED / saved
            found[f"resume on {layout} from {saved}"] = lambda _, row=needs, f=folder: resume(row, f, bases)
    return found


if __name__ == "__main__":
    main(checks(Path(sys.argv[1]).parent, int(os.environ["WORLD_SIZE"])))
