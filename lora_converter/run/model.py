"""The model of a run in its two parts: the base, which comes from somewhere, and the adapters, which are trained."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
import torch.distributed as dist

from lora_converter.adapted import AdaptedModule, adapted_modules, adapter_parameters, has_stacked_experts
from lora_converter.config import LoRAConfig
from lora_converter.dcp.states import ModelSubset
from lora_converter.dcp.twins import Twins
from lora_converter.dora import CHANGE, DoRALinear
from lora_converter.experts import expert_shapes
from lora_converter.fingerprint import Sums, base_sums, fingerprint
from lora_converter.linear import LoRALinear, linear_shapes
from lora_converter.names import plain_parameters
from lora_converter.new_tokens import grown_weights, token_rows
from lora_converter.offset import make_plain
from lora_converter.own_names import in_canonical_names
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_module import packed_formats
from lora_converter.ranks import agreed, gather_all, gather_to_first, is_first_rank, merged_over_ranks, union_over_ranks
from lora_converter.run.description import Description
from lora_converter.run.host import Host
from lora_converter.run.names import HostNames
from lora_converter.swap import swapped_in
from lora_converter.tensors import full_tensor, is_finite, reshard
from lora_converter.token_rows import TokenRows, TokenRowsEmbedding, TokenRowsHead
from lora_converter.trained import tied_to_trained, trained_parameters


class RunModel:
    """A host's model with adapters, all pipeline stages of this rank.

    Attributes:
        base_fingerprint: Of the base that was loaded; empty before, and for a base without source.
        packed: Packed weights of all ranks -> their format, and their shape before; empty before `twins`.
    """

    def __init__(self, host: Host):
        self.host, self.parts = host, host.model_parts
        self.base_fingerprint = ""
        self.packed: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._names = {name for part in self.parts for name in adapter_parameters(part)}
        self._of_base = {name for part in self.parts for name in trained_parameters(part)}

    @functools.cached_property
    def adapters(self) -> ModelSubset:
        """What trains."""
        return ModelSubset(self.parts, lambda name: name in self._names)

    @functools.cached_property
    def base(self) -> ModelSubset:
        """What the base's source has: all but the adapters. What `train_also` names starts from there."""
        return ModelSubset(self.parts, lambda name: name not in self._names or name in self._of_base)

    def tied(self) -> dict[str, list[str]]:
        """Weights of `train_also` that are tied, of all ranks -> their other names. A collective."""
        return merged_over_ranks({n: others for part in self.parts for n, others in tied_to_trained(part).items()})

    def trained_names(self) -> list[str]:
        """All names of the weights of `train_also`, of all ranks. A collective."""
        return [*union_over_ranks(sorted(self._of_base)), *(n for others in self.tied().values() for n in others)]

    def frozen_names(self) -> list[str]:
        """This rank's entries that no step stores whose base has a source."""
        return [name for name in self.base.state_dict() if name not in self._of_base]

    @functools.cached_property
    def stored(self) -> ModelSubset:
        """What a step stores of the model: the base too where nothing else could bring it back."""
        return self.adapters if self.host.job.base else ModelSubset(self.parts)

    @property
    def description(self) -> Description:
        """What the run's steps say of it."""
        packed = {self.host.canonical_name(name): form for name, form in self.packed.items()}
        described = Description.of_job(self.host.job, self.base_fingerprint, packed)
        return replace(described, lora=in_canonical_names(described.lora, self.host.canonical_name))

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

    @functools.cached_property
    def host_names(self) -> HostNames:
        """What the names in step folders are here. The first look is a collective."""
        return HostNames([*self.adapted_fqns(), *self.base_names()], self.host.canonical_name)

    def base_names(self) -> list[str]:
        """The base's entries of all ranks. A collective."""
        return union_over_ranks(list(self.base.state_dict()))

    @property
    def kinds(self) -> set[type[AdaptedModule]]:
        """Kinds of adapters that this run knows by their parameters' names."""
        return {LoRALinear, TokenRowsEmbedding, TokenRowsHead, *(_kind(module) for module in self.adapted)}

    def keep_of_base(self) -> None:
        """What adapters keep of the base that has been loaded. A collective."""
        for part in self.parts:
            reshard(part)
        for module in self.adapted:
            module.keep_of_base()

    def twins(self) -> Twins:
        """The base, to be read into, before any check of what was trained on it; sets `packed`. A collective."""
        params = {name: param for part in self.parts for name, param in plain_parameters(part)}
        formats = {name: form for part in self.parts for name, form in packed_formats(part).items()}
        if self.host.job.config.base_format:
            own = {name: (form, FORMATS[form].weight_shape(params[name].shape)) for name, form in formats.items()}
            self.packed = merged_over_ranks(own)
        grown = {name: rows for part in self.parts for name, rows in grown_weights(part).items()}
        return Twins(self.base, formats, {name: rows for name, rows in grown.items() if name in self.base.state_dict()})

    def take_fingerprint(self, before_packing: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        """Of the base that has been loaded: that of all pipeline stages. A collective.

        Args:
            before_packing: What packed weights were (see `base_sums`).
        """
        name, sums = self.host.canonical_name, Sums()
        for part in self.parts:
            sums |= base_sums(part, canonical_name=name, before_packing=before_packing)
        if "pp" in self.host.meshes:
            sums = merged_over_ranks(sums)
        self.base_fingerprint = agreed(fingerprint(sums), "The fingerprint of the base")

    def peft_names(self) -> dict[str, tuple[str, str]]:
        """Adapted weight -> the parameters that PEFT calls its lora_A and lora_B, of all ranks. A collective."""
        mine = {weight: names for module in self.adapted for weight, names in module.peft_names().items()}
        return merged_over_ranks(mine)

    def configs(self) -> dict[str, LoRAConfig]:
        """FQN -> settings of the adapted modules of all ranks. A collective."""
        mine = {module.lora_fqn: module.lora_config for module in self.adapted}
        return merged_over_ranks(mine)

    def has_experts(self) -> bool:
        """Whether the model has routed experts, on any rank. A collective."""
        return any(gather_all(any(map(has_stacked_experts, self.parts))))

    def token_modules(self) -> dict[str, TokenRows]:
        """Modules of which rows of tokens train, on this rank, by the names of their weights."""
        return {f"{m.lora_fqn}.weight": m for part in self.parts for m in token_rows(part).values()}

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """FQN -> (out_features, in_features) of the linears of all ranks. A collective."""
        mine = {fqn: shape for part in self.parts for fqn, shape in linear_shapes(part).items()}
        return merged_over_ranks(mine)

    def expert_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Adapted experts modules of all ranks -> their weights -> (experts, out, in). A collective."""
        mine = {fqn: shapes for part in self.parts for fqn, shapes in expert_shapes(part).items()}
        return merged_over_ranks(mine)

    def gather_adapters(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The adapters of all pipeline stages as full CPU tensors on rank 0, nothing elsewhere. A collective.

        One tensor at a time is unsharded, by the ranks of its stage, and sent by one of them where rank 0 is none. What
        is not sharded is the parameter itself. Of tokens it is the rows, as PEFT stores them.

        Args:
            dtype: Of what rank 0 keeps; a tensor that would hold inf in it keeps its own.
        """
        sends = all(mesh.get_local_rank() == 0 for name, mesh in self.host.meshes.items() if name != "pp")
        own = self.adapters.state_dict()
        rows = {name: module for part in self.parts for name, module in token_rows(part).items()}
        forms = gather_to_first({name: (value.shape, value.dtype) for name, value in own.items()} if sends else {})
        for part in self.parts if rows else ():
            reshard(part)
        # Weights that are offloaded are elsewhere than what sends them.
        device = self.host.meshes["pp"].device_type if "pp" in self.host.meshes else "cpu"
        gathered: dict[str, torch.Tensor] = {}
        for name, value in own.items():
            full = rows[name].whole_rows().to(value.dtype) if name in rows else full_tensor(value).detach()
            if is_first_rank():
                gathered[name] = _kept(full, dtype)
            elif sends:
                dist.send(full.to(device).contiguous(), dst=0)
        for rank, of_stage in enumerate(forms[1:], 1):
            for name, (shape, own_dtype) in of_stage.items():
                full = torch.empty(shape, dtype=own_dtype, device=device)
                dist.recv(full, src=rank)
                gathered[name] = _kept(full, dtype)
        return gathered

    def gather_for_peft(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What `to_peft` takes: the tensors of plain adapters under all of their names, and DoRA's magnitudes.

        On rank 0, nothing elsewhere. A collective.

        Args:
            dtype: See `gather_adapters`. What factors have moved by is small beside what they began at, and is rounded
                alone: with `init` the tensors are fp32.
        """
        tied, magnitudes = self.tied(), self._gather_magnitudes()
        gathered = self.gather_adapters(torch.float32 if self.host.job.config.init else dtype)
        gathered |= {other: gathered[name] for name, others in tied.items() if name in gathered for other in others}
        for weight in magnitudes:  # what was added to the norms, of which they are the sums
            del gathered[f"{weight.rpartition('.')[0]}.{CHANGE}"]
        make_plain(gathered)
        return gathered, magnitudes

    def _gather_magnitudes(self) -> dict[str, torch.Tensor]:
        """Adapted weight -> DoRA's magnitudes, (out_features), of all pipeline stages, on rank 0. A collective."""
        if not self.host.job.config.use_dora:
            return {}
        own = {f"{m.lora_fqn}.weight": m.magnitude().cpu() for m in self.adapted if isinstance(m, DoRALinear)}
        sends = all(mesh.get_local_rank() == 0 for name, mesh in self.host.meshes.items() if name != "pp")
        return {name: value for part in gather_to_first(own if sends else {}) for name, value in part.items()}


def _kept(full: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU in `dtype`, if it is finite there or nowhere."""
    kept = full.to("cpu", dtype)
    return kept if is_finite(kept) or not is_finite(full) else full.cpu()


def _kind(module: AdaptedModule) -> type[AdaptedModule]:
    """The kind itself, of the classes that swapping has stacked up."""
    return next(mixin for mixin in swapped_in(type(module)) if issubclass(mixin, AdaptedModule))
