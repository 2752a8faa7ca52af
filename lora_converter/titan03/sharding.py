"""How factors lie on torchtitan 0.3's meshes: declared beside their base linear's, before the model is parallelized.

A factor follows its linear (see `tensor_parallel.py`). Where it is whole beside a sharded weight its gradient is a
partial sum over the ranks of tensor parallelism. It is declared `I`, invariant, all the same: `R` would have FSDP2 sum
each such gradient by itself at every micro-batch, and they are summed once per step.
"""

import dataclasses
from typing import Any

import spmd_types as spmd
import torch
import torch.nn as nn
from torchtitan.distributed.parallel_dims import MeshAxisName, ParallelDims, SpmdLayout
from torchtitan.distributed.spmd_types import set_current_spmd_mesh, spmd_distribute_tensor
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from lora_converter.adapted import adapted_modules
from lora_converter.dora import CHANGE, DoRALinear
from lora_converter.linear import LoRALinear
from lora_converter.packed_module import packed_weights
from lora_converter.swap import swap_class
from lora_converter.tensor_parallel import LoRAFactor


class TitanFactor(LoRAFactor, Module):
    """A factor that torchtitan's `Module` protocol places."""

    is_whole_beside_shards: bool = False

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """torchtitan's; a factor that stays whole knows over which mesh."""
        super().parallelize(parallel_dims)
        if self.is_whole_beside_shards and parallel_dims.tp_enabled:
            self.whole_over = parallel_dims.get_mesh("tp")


class TitanPacked(nn.Module):
    """What a packed linear's class gains: torchtitan would have the bytes require gradients."""

    def _spmd_distribute_state(
        self, parallel_dims: ParallelDims, name: str, tensor: torch.Tensor, layout: SpmdLayout, *, is_param: bool
    ) -> None:
        if tensor.is_floating_point():
            distribute: Any = super()._spmd_distribute_state  # type: ignore[misc]
            return distribute(parallel_dims, name, tensor, layout, is_param=is_param)
        mesh = parallel_dims.get_optional_mesh([axis.value for axis in layout.axes()], include_singleton_axes=True)
        own = nn.Parameter(spmd_distribute_tensor(tensor, mesh, layout), requires_grad=False)
        self.register_parameter(name, own)
        with set_current_spmd_mesh(mesh):
            spmd.assert_type(own, layout.axis_types, layout.partition_spec)


def place_adapters(model: nn.Module) -> None:
    """Declares where the adapters of a model lie, from what its linears' configs say of their weights."""
    for packed in {module for module, _ in packed_weights(model)}:
        swap_class(packed, TitanPacked)
    for linear in adapted_modules(model):
        if not isinstance(linear, LoRALinear):
            raise ValueError(f"{linear.lora_fqn}: torchtitan 0.3 is no host for {linear.adapter_kind} yet.")
        own = {name: nn.init.zeros_ for name in linear.adapter_parameter_names if "." not in name}
        vars(linear)["_param_init"] = {**(linear._param_init or {}), **own}  # its values come after
        config: ShardingConfig | None = getattr(linear, "_sharding_config", None)
        if config is None:
            continue
        of_weight = config.state_shardings["weight"].per_axis_spmd_types()[MeshAxisName.TP]
        for name in linear.factor_names:
            factor = linear.get_submodule(name)
            assert isinstance(factor, TitanFactor)
            over_tp, factor.is_whole_beside_shards = _beside(of_weight, spmd.S(1 - factor.rank_dim))
            factor._sharding_config = ShardingConfig(state_shardings={"weight": dense_param_placement(tp=over_tp)})
        if isinstance(linear, DoRALinear):
            over_tp, _ = _beside(of_weight, spmd.S(0))
            states = config.state_shardings | {CHANGE: dense_param_placement(tp=over_tp)}
            vars(linear)["_sharding_config"] = dataclasses.replace(config, state_shardings=states)


def _beside(of_weight: Any, features: Any) -> tuple[Any, bool]:
    """The type over TP of what has the features of one of the weight's dims, and whether it is whole beside shards."""
    is_whole = isinstance(of_weight, spmd.Shard) and of_weight != features
    return (spmd.I if is_whole else of_weight), is_whole
