"""Two gloo ranks: which collectives run, over how many elements, with adapters and without."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import BASE_CONFIG, CONFIG, Run, adapter_state, build, finish, full_state
from launch import main
from memory import kept_by_selective_checkpointing
from parity import CP2, FSDP2, OP_SAC, TP2, fill_b
from tiny_models import base_options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from lora_converter import LoRAConfig, adapter_parameters, apply_lora, merge_adapter, order, unmerge_adapter
from lora_converter.adapted import adapted_modules
from lora_converter.order import Order
from lora_converter.tensor_parallel import mark_partial_gradients, sum_partial_gradients


class Collectives(TorchDispatchMode):
    """Counts (collective, elements of its input), of functional and of process-group collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "_c10d_functional" and name != "wait_tensor":
            self.counts[name, args[0].numel()] += 1
        elif namespace == "c10d":
            self.counts[name, sum(t.numel() for t in torch.utils._pytree.tree_leaves(args[1]) if is_tensor(t))] += 1
        return func(*args, **(kwargs or {}))

    def elements(self, name: str) -> int:
        return sum(size * count for (called, size), count in self.counts.items() if called == name)


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextmanager
def trainer(folder: Path, *options: str, config: Path = CONFIG) -> Iterator[Run]:
    run = build(folder, *options, config=config)
    run.trainer.checkpointer.load()
    yield run
    run.trainer.close()


def forward_and_backward(run: Run) -> Collectives:
    """One step's, from the first block to the loss; the embedding, which full training trains too, is cut off."""
    model = run.trainer.model_parts[0]
    tokens = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    model.tok_embeddings.weight.requires_grad_(False)
    model.tok_embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    with run.trainer.train_context(), Collectives() as seen:
        run.trainer.loss_fn(model(tokens), tokens).backward()
    return seen


def same_collectives(folder: Path, model: str) -> Any:
    """With adapters on every linear a tensor-parallel model runs the collectives it runs without, byte for byte."""
    options = [*base_options(model, folder.parent.parent), *TP2]
    with trainer(folder / "lora", *options, "--lora.target_modules=all-linear,output") as run:
        with_adapters = forward_and_backward(run)
    with trainer(folder / "base", *options, config=BASE_CONFIG) as run:
        without = forward_and_backward(run)
    assert without.counts and with_adapters.counts == without.counts, (with_adapters.counts, without.counts)
    return {f"{name} {size}": count for (name, size), count in with_adapters.counts.items()}


def dora_adds_one_small_reduction(folder: Path) -> Any:
    """For each row-wise linear, of a number per output row; a column-wise one has its sums on its own rank."""
    options = [*base_options("llama3", folder.parent.parent), *TP2]
    counts = {}
    for name, more in (("plain", ()), ("dora", ("--lora.use_dora",))):
        with trainer(folder / name, *options, *more) as run:
            fill_b(run)
            counted = forward_and_backward(run).counts.items()
            counts[name] = Counter({key: count for key, count in counted if not key[0].startswith("_wrap")})
            layers = run.trainer.model_parts[0].layers.values()
            rows = Counter(layer.attention.wo.out_features for layer in layers)
            rows += Counter(layer.feed_forward.w2.out_features for layer in layers)
    added = {("all_reduce", size): count for size, count in rows.items()}
    assert counts["dora"] - counts["plain"] == added and not counts["plain"] - counts["dora"], counts
    return {f"{name} {size}": count for (name, size), count in added.items()}


def only_adapter_gradients_are_reduced(folder: Path) -> Any:
    """FSDP2 reduces as many elements as the adapters have, and gathers as often as without adapters."""
    options = [*base_options("llama3", folder.parent.parent), *FSDP2]
    with trainer(folder / "lora", *options) as run:
        seen = forward_and_backward(run)
        adapters = sum(value.numel() for value in adapter_state(run).values())
        frozen = [p for p in run.trainer.model_parts[0].parameters() if not p.requires_grad]
        assert frozen and all(p.grad is None for p in frozen)
    with trainer(folder / "base", *options, config=BASE_CONFIG) as run:
        without = forward_and_backward(run)
    gathers = [sum(n for (name, _), n in s.counts.items() if "allgather" in name) for s in (seen, without)]
    assert gathers[0] == gathers[1] > 0, gathers
    reduced = seen.elements("_reduce_scatter_base_")
    assert reduced == adapters, (reduced, adapters, seen.counts)
    return {"reduced": reduced, "without adapters": without.elements("_reduce_scatter_base_")}


def a_loss_in_chunks_gathers_the_head_once(folder: Path) -> Any:
    """FSDP2 gathers as for a loss over logits; tensor parallelism reduces twice a chunk."""
    tokens = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    base, always = base_options("llama3", folder.parent.parent), "--parallelism.fsdp_reshard_after_forward=always"
    found = {}
    for name, layout in (("FSDP2", FSDP2), ("FSDP2, always", [*FSDP2, always]), ("TP2", TP2)):
        counts = []
        for chunk in (24, 0):
            option = f"--lora.loss_chunk_tokens={chunk}"
            with trainer(folder / f"{name} {chunk}", *base, *layout, option) as run, Collectives() as seen:
                run.trainer.forward_backward_step(
                    input_dict={"input": tokens}, labels=tokens, global_valid_tokens=torch.tensor(256.0)
                )
            counts.append(seen.counts)
        found[name] = [dict(counts[0] - counts[1]), dict(counts[1] - counts[0])]
    assert found["FSDP2"] == found["FSDP2, always"] == [{}, {}], found
    chunks = 11  # of 256 tokens; what torchtitan's loss reduces inside DTensor is not seen here
    assert found["TP2"] == [{("allreduce_", 0): 2 * chunks}, {}], found


def frozen_weights_are_stored_in_the_compute_dtype(folder: Path) -> Any:
    """bf16 under FSDP2: half the bytes, and the base's own output bit for bit."""
    options = [*base_options("llama3", folder.parent.parent), *FSDP2, "--training.mixed_precision_param=bfloat16"]
    tokens = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    outputs = []
    for name, config in (("lora", CONFIG), ("base", BASE_CONFIG)):
        with trainer(folder / name, *options, config=config) as run, torch.no_grad():
            model = run.trainer.model_parts[0]
            dtypes = {
                p.dtype: {q.requires_grad for q in model.parameters() if q.dtype == p.dtype} for p in model.parameters()
            }
            expected = {torch.float32: {True}, torch.bfloat16: {False}} if name == "lora" else {torch.float32: {True}}
            assert dtypes == expected, dtypes
            outputs.append(model(tokens))
    assert torch.equal(*outputs)


def selective_ac_keeps_what_full_fine_tuning_keeps(folder: Path) -> dict[str, int]:
    """Elements on this rank, one step; beside them only S, (tokens, rank) per kept linear."""
    figures = {}
    for name, layout in (("TP2", TP2), ("FSDP2", FSDP2)):
        options = [*base_options("llama3", folder.parent.parent), *layout, *OP_SAC]
        kept = {}
        for kind, config in (("full", BASE_CONFIG), ("lora", CONFIG)):
            with trainer(folder / name / kind, *options, config=config) as run:
                kept[kind] = selectively_kept(run)
        rank_sized = sum(n for shape, n in kept["lora"].items() if shape[-1] == 4)
        assert {s: n for s, n in kept["lora"].items() if s[-1] != 4} == kept["full"], (name, kept)
        assert rank_sized and sum(kept["full"].values()) > 10 * rank_sized, (name, kept)
        figures[name] = sum(kept["full"].values())
    return figures


def selectively_kept(run: Run) -> dict[tuple[int, ...], int]:
    """Shape on this rank -> elements that selective activation checkpointing keeps of one forward."""
    kept: dict[tuple[int, ...], int] = defaultdict(int)
    inputs = torch.randint(0, 320, (2, 64))
    for local in kept_by_selective_checkpointing(lambda: run.trainer.model_parts[0](inputs)):
        kept[tuple(local.flatten(0, -2).shape)] += local.numel()
    return kept


def dropout_masks_are_shared_by_tensor_parallel_ranks_alone(folder: Path) -> Any:
    """The seed of the masks after one step: equal where ranks see the same rows, different where they do not."""
    for layout, distinct in ((TP2, 1), (FSDP2, 2), (CP2, 2)):
        options = [*base_options("llama3", folder.parent.parent), *layout, "--lora.dropout=0.1", "--training.steps=1"]
        run = build(folder / layout[0], *options)
        finish(run)
        seeds: list[int] = [0, 0]
        dist.all_gather_object(seeds, torch.initial_seed())
        assert len(set(seeds)) == distinct, (layout, seeds)


def merging_keeps_the_output_and_unmerging_gives_the_base_back(folder: Path) -> Any:
    """On sharded weights: the merged model's logits, then every base weight bit for bit."""
    tokens = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    dora = ["--lora.use_dora"]
    for name, layout in (("tp", TP2), ("fsdp", FSDP2), ("dora-tp", [*TP2, *dora]), ("dora-fsdp", [*FSDP2, *dora])):
        with trainer(folder / name, *base_options("llama3", folder.parent.parent), *layout) as run, torch.no_grad():
            fill_b(run)
            model = run.trainer.model_parts[0]

            def logits(model: nn.Module = model) -> torch.Tensor:
                out = model(tokens)
                return out.full_tensor() if isinstance(out, DTensor) else out

            before, expected = full_state(run), logits()
            merge_adapter(model)
            changed = {n for n, value in full_state(run).items() if not torch.equal(value, before[n])}
            assert changed == {f"{linear.lora_fqn}.weight" for linear in adapted_modules(model)}
            # fp32: one product with the sum instead of the sum of two products.
            torch.testing.assert_close(logits(), expected, rtol=1e-5, atol=1e-4)
            unmerge_adapter(model)
            assert all(torch.equal(value, before[n]) for n, value in full_state(run).items())


class Mlp(nn.Module):
    """Column-wise, then row-wise, both with a bias; 7 hidden features do not split evenly over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def adapted_mlp(*, use_dora: bool) -> Mlp:
    torch.manual_seed(0)
    model = Mlp()
    apply_lora(model, LoRAConfig(rank=3, use_dora=use_dora))
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            param.normal_()
    return model


def a_plain_model_with_biases_and_uneven_shards(folder: Path) -> Any:
    """Outputs, gradients of the input and of the adapters are those of one device, by torch's own parallel styles."""
    for wanted in Order:
        with mock.patch.object(order, "order_of", lambda device, dtype, wanted=wanted: wanted):
            two_ranks_are_one(sequence_parallel=False)
            two_ranks_are_one(sequence_parallel=True)
            for keeps in (False, True):
                two_ranks_are_one(sequence_parallel=True, use_dora=True, keeps=keeps)


def two_ranks_are_one(*, sequence_parallel: bool, use_dora: bool = False, keeps: bool = False) -> None:
    """keeps: What depends on the base alone is computed before the forward."""
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    between = Shard(0) if sequence_parallel else Replicate()
    plan = {
        "up": ColwiseParallel(input_layouts=between, use_local_output=False),
        "down": RowwiseParallel(output_layouts=between, use_local_output=False),
    }
    one, two, mesh = adapted_mlp(use_dora=use_dora), adapted_mlp(use_dora=use_dora), init_device_mesh("cpu", (2,))
    parallelize_module(two, mesh, plan)
    mark_partial_gradients(two)
    for module in (m for model in (one, two) for m in adapted_modules(model) if keeps):
        module.keep_of_base()
    results = []
    for model, inputs in ((one, x.clone()), (two, distribute_tensor(x, mesh, [between]))):
        inputs.requires_grad_()
        out = model(inputs)
        out.square().sum().backward()
        sums = sum_partial_gradients(model.parameters())
        grads = [param.grad for param in adapter_parameters(model).values()]
        results.append([g.full_tensor() if isinstance(g, DTensor) else g for g in (out, inputs.grad, *grads)])
    assert sums == 1
    # fp32, sums of at most 7 terms in another order.
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert {n for n, p in two.named_parameters() if p.requires_grad} == set(adapter_parameters(two))


CHECKS = {
    "llama3: the collectives of a TP model are those without adapters": lambda f: same_collectives(f, "llama3"),
    "qwen3: the collectives of a TP model are those without adapters": lambda f: same_collectives(f, "qwen3"),
    "DoRA adds one small reduction to a row-wise linear": dora_adds_one_small_reduction,
    "FSDP2 reduces the adapters' gradients alone": only_adapter_gradients_are_reduced,
    "a loss in chunks gathers the head once": a_loss_in_chunks_gathers_the_head_once,
    "FSDP2 stores frozen weights in bf16": frozen_weights_are_stored_in_the_compute_dtype,
    "merging on sharded weights": merging_keeps_the_output_and_unmerging_gives_the_base_back,
    "dropout masks are shared by tensor-parallel ranks alone": dropout_masks_are_shared_by_tensor_parallel_ranks_alone,
    "selective AC keeps what full fine-tuning keeps": selective_ac_keeps_what_full_fine_tuning_keeps,
    "biases and uneven shards under TP and SP, in every order": a_plain_model_with_biases_and_uneven_shards,
}

if __name__ == "__main__":
    main(CHECKS)
