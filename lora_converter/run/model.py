"""The model of a run in its two parts: the base, which comes from somewhere, and the adapters, which are trained."""

import functools

import torch

from lora_converter.adapted import AdaptedModule, adapted_modules, adapter_parameters, has_stacked_experts
from lora_converter.config import LoRAConfig
from lora_converter.dcp.states import ModelSubset
from lora_converter.experts import expert_shapes
from lora_converter.fingerprint import base_sums, fingerprint
from lora_converter.linear import LoRALinear, linear_shapes
from lora_converter.ranks import agreed, gather_all, gather_to_first, union_over_ranks
from lora_converter.run.description import Description
from lora_converter.run.host import Host
from lora_converter.swap import swapped_in
from lora_converter.tensors import full_tensor


class RunModel:
    """A host's model with adapters, all pipeline stages of this rank.

    Attributes:
        base_fingerprint: Of the base that was loaded; empty before, and for a base without source.
    """

    def __init__(self, host: Host):
        self.host, self.parts = host, host.model_parts
        self.base_fingerprint = ""
        self._names = {name for part in self.parts for name in adapter_parameters(part)}

    @functools.cached_property
    def adapters(self) -> ModelSubset:
        """What trains."""
        return ModelSubset(self.parts, lambda name: name in self._names)

    @functools.cached_property
    def base(self) -> ModelSubset:
        """Everything else."""
        return ModelSubset(self.parts, lambda name: name not in self._names)

    @functools.cached_property
    def stored(self) -> ModelSubset:
        """What a step stores of the model: the base too where nothing else could bring it back."""
        return self.adapters if self.host.job.base else ModelSubset(self.parts)

    @property
    def description(self) -> Description:
        """What the run's steps say of it."""
        return Description.of_job(self.host.job, self.base_fingerprint)

    @property
    def adapted(self) -> list[AdaptedModule]:
        """The adapted modules of this rank."""
        return [module for part in self.parts for module in adapted_modules(part)]

    def adapted_fqns(self) -> list[str]:
        """The adapted modules of all ranks. A collective."""
        return sorted(union_over_ranks([module.lora_fqn for module in self.adapted]))

    def adapter_names(self) -> list[str]:
        """The adapters' parameters of all ranks. A collective."""
        return union_over_ranks(sorted(self._names))

    def base_names(self) -> list[str]:
        """The base's entries of all ranks. A collective."""
        return union_over_ranks(list(self.base.state_dict()))

    @property
    def kinds(self) -> set[type[AdaptedModule]]:
        """Kinds of adapters that this run knows by their parameters' names."""
        return {LoRALinear, *(_kind(module) for module in self.adapted)}

    def take_fingerprint(self) -> None:
        """Of the base that has been loaded: that of all pipeline stages. A collective."""
        name = self.host.canonical_name
        sums = {key: found for part in self.parts for key, found in base_sums(part, canonical_name=name).items()}
        if "pp" in self.host.meshes:
            sums = {key: found for part in gather_all(sums) for key, found in part.items()}
        self.base_fingerprint = agreed(fingerprint(sums), "The fingerprint of the base")

    def peft_names(self) -> dict[str, tuple[str, str]]:
        """Adapted weight -> the parameters that PEFT calls its lora_A and lora_B, of all ranks. A collective."""
        mine = {weight: names for module in self.adapted for weight, names in module.peft_names().items()}
        return {weight: names for found in gather_all(mine) for weight, names in found.items()}

    def configs(self) -> dict[str, LoRAConfig]:
        """FQN -> settings of the adapted modules of all ranks. A collective."""
        mine = {module.lora_fqn: module.lora_config for module in self.adapted}
        return {fqn: config for found in gather_all(mine) for fqn, config in found.items()}

    def has_experts(self) -> bool:
        """Whether the model has routed experts, on any rank. A collective."""
        return any(gather_all(any(map(has_stacked_experts, self.parts))))

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """FQN -> (out_features, in_features) of the linears of all ranks. A collective."""
        mine = {fqn: shape for part in self.parts for fqn, shape in linear_shapes(part).items()}
        return {fqn: shape for found in gather_all(mine) for fqn, shape in found.items()}

    def expert_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Adapted experts modules of all ranks -> their weights -> (experts, out, in). A collective."""
        mine = {fqn: shapes for part in self.parts for fqn, shapes in expert_shapes(part).items()}
        return {fqn: shapes for found in gather_all(mine) for fqn, shapes in found.items()}

    def gather_adapters(self) -> dict[str, torch.Tensor]:
        """The adapters of all pipeline stages as full CPU tensors on rank 0, nothing elsewhere. A collective.

        One rank per stage sends; the others only take part in unsharding, one tensor at a time.
        """
        sends = all(mesh.get_local_rank() == 0 for name, mesh in self.host.meshes.items() if name != "pp")
        mine: dict[str, torch.Tensor] = {}
        for name, value in self.adapters.state_dict().items():
            full = full_tensor(value)
            if sends:
                mine[name] = full.detach().cpu().clone()
        return {name: value for found in gather_to_first(mine) for name, value in found.items()}


def _kind(module: AdaptedModule) -> type[AdaptedModule]:
    """The kind itself, of the classes that swapping has stacked up."""
    return next(mixin for mixin in swapped_in(type(module)) if issubclass(mixin, AdaptedModule))
