"""How factors lie on torchtitan 0.3's meshes: declared beside their base weights', before the model is parallelized.

A factor follows its weight (see `tensor_parallel.py`). Where it is whole beside a sharded weight its gradient is a
partial sum over the ranks of tensor parallelism. It is declared `I`, invariant, all the same: `R` would have FSDP2 sum
each such gradient by itself at every micro-batch, and they are summed once per step.
"""

from dataclasses import replace
from typing import Any, cast

import spmd_types as spmd
import torch
import torch.nn as nn
from torchtitan.distributed.parallel_dims import MeshAxisName, ParallelDims, SpmdLayout
from torchtitan.distributed.spmd_types import set_current_spmd_mesh, spmd_distribute_tensor
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from lora_converter.adapted import adapted_modules
from lora_converter.beside import shared_dims
from lora_converter.packed_module import packed_weights
from lora_converter.swap import swap_class
from lora_converter.tensor_parallel import LoRAFactor


class TitanFactor(LoRAFactor, Module):
    """A factor that torchtitan's `Module` protocol places."""

    whole_beside_shards: tuple[str, ...] = ()

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """torchtitan's; a factor that stays whole knows over which mesh."""
        super().parallelize(parallel_dims)
        if self.whole_beside_shards:
            self.whole_over = parallel_dims.get_optional_mesh("tp")


class TitanPacked(nn.Module):
    """What a packed linear's class gains: torchtitan would have the bytes require gradients."""

    def _spmd_distribute_state(
        self, parallel_dims: ParallelDims, name: str, tensor: torch.Tensor, layout: SpmdLayout, *, is_param: bool
    ) -> None:
        if tensor.is_floating_point():
            distribute: Any = cast(Any, super())._spmd_distribute_state
            return distribute(parallel_dims, name, tensor, layout, is_param=is_param)
        over_tp, blocks = layout.per_axis_spmd_types()[MeshAxisName.TP], tensor.shape[1]
        if over_tp == spmd.S(1) and blocks % parallel_dims.tp:
            raise ValueError(f"lora.base_format: TP of {parallel_dims.tp} does not divide {blocks} blocks of a row.")
        mesh = parallel_dims.get_optional_mesh([axis.value for axis in layout.axes()], include_singleton_axes=True)
        own = nn.Parameter(spmd_distribute_tensor(tensor, mesh, layout), requires_grad=False)
        self.register_parameter(name, own)
        with set_current_spmd_mesh(mesh):
            spmd.assert_type(own, layout.axis_types, layout.partition_spec)


def place_adapters(model: nn.Module) -> None:
    """Declares where the adapters of a model lie, from what its modules' configs say of their weights."""
    for packed in {module for module, _ in packed_weights(model)}:
        swap_class(packed, TitanPacked)
    for module in cast(Any, adapted_modules(model)):
        own = {name: nn.init.zeros_ for name in module.adapter_parameter_names if "." not in name}
        if own and module._param_init is not None:  # where others have no place; their values come after
            vars(module)["_param_init"] = {**module._param_init, **own}
        config: Any = getattr(module, "_sharding_config", None)
        for name, (weight, shared) in shared_dims(module).items() if config is not None else ():
            types = config.state_shardings[weight].per_axis_spmd_types()
            layout = SpmdLayout({axis: _beside(its, shared) for axis, its in types.items()})
            owner, _, last = name.rpartition(".")
            holder: Any = module.get_submodule(owner)
            there = holder._sharding_config or ShardingConfig(state_shardings={})
            vars(holder)["_sharding_config"] = replace(there, state_shardings=there.state_shardings | {last: layout})
            is_whole = any(isinstance(its, spmd.Shard) and its.dim not in shared for its in types.values())
            if is_whole and hasattr(holder, "whole_beside_shards"):  # a magnitude goes by its factors
                holder.whole_beside_shards += (last,)


def _beside(of_weight: Any, shared: dict[int, int]) -> Any:
    """The type over an axis of what lies beside a weight."""
    if not isinstance(of_weight, spmd.Shard):
        return of_weight
    return spmd.S(shared[of_weight.dim]) if of_weight.dim in shared else spmd.I
