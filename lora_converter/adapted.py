"""What an adapted module is: the protocol through which everything else in the package deals with adapters.

A kind of adapted module (`linear.py` is one) is a class that derives from `AdaptedModule` and is put onto a module
that is there by swapping that module's class. It declares which of its parameters are the adapter's, how they begin,
what they add to the base weights, and what PEFT calls them. Selection, freezing, state dicts, checkpoints, faults,
merging, fingerprints and sums of gradients ask for nothing else.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lora_converter.config import LoRAConfig
from lora_converter.swap import check_forward_is_called, class_below, follow_hook, reduced, subclass_with, swap_class
from lora_converter.tensors import local_part, reshard
from lora_converter.trained import trained_parameters
from lora_converter.updates import add_updates, on_all_ranks

M = TypeVar("M", bound=nn.Module)


class AdaptedModule(nn.Module):
    """A module with a trained adapter beside its frozen parameters. A kind derives from it and is never constructed.

    Attributes:
        lora_config: The settings that the adapter was put on with.
        lora_fqn: Name of the module in the whole model; pipeline stages and wrappers do not change it.
        lora_canonical_name: The same module's name on any host; decides the initial values.
        lora_enabled: False while `disable_adapter` is entered: the forward is then the base's.
        lora_unmerged: Weight -> what it was, this rank's part, while the update is merged into it.
    """

    adapter_kind: ClassVar[str]
    """Plural noun for log lines: `linears`."""

    adapter_parameter_names: ClassVar[tuple[str, ...]]
    """The adapter's, by declaration: every other parameter below this module belongs to the base."""

    frozen_parameter_names: ClassVar[tuple[str, ...]] = ()
    """Those of them that do not train, and are stored beside what does."""

    zero_at_start: ClassVar[tuple[str, ...]] = ()
    """Those whose zeros make the update zero, as it is before the first step."""

    peft_factors: ClassVar[dict[str, tuple[str, str]]] = {}
    """Base weight -> the parameters that PEFT calls lora_A and lora_B; empty for a kind that PEFT cannot express."""

    peft_rows: ClassVar[str] = ""
    """The parameter that PEFT stores as trainable tokens, together with the base's rows that it is added to."""

    updates_all_owners: bool = False
    """An update of a weight is meant for whoever else owns it."""

    packed_format: str = ""
    """The format of the base weights, if they are packed."""

    lora_config: LoRAConfig
    lora_fqn: str
    lora_canonical_name: str
    lora_enabled: bool
    lora_unmerged: dict[str, torch.Tensor] | None

    def reset_adapter(self, seed: int) -> None:
        """Gives the adapter its initial values, which depend on `seed` and the canonical name alone. No collective."""
        raise NotImplementedError

    def reset_from_base(self, seed: int) -> None:
        """Gives the adapter the initial values that depend on the base's weights, if it has such. A collective.

        The weights are there, and sharded parameters in place.
        """

    def keep_of_base(self) -> None:
        """Keeps what depends on the base's weights alone, which are there and change no more. A collective."""

    def merged_names(self) -> list[str]:
        """The base weights that the adapter adds to."""
        raise NotImplementedError

    def local_updates(self, weight: str) -> Iterator[torch.Tensor]:
        """What the adapter adds to a base weight: this rank's part in fp32, in pieces along the weight's first dim.

        A collective where factors are sharded: ranks that share the weight call it in the same order.
        """
        raise NotImplementedError

    def whole_over(self) -> dict[str, DeviceMesh]:
        """Adapter parameter -> the mesh over which it is whole while its gradient on each rank is a partial sum."""
        return {}

    def remove_adapter(self) -> None:
        """Deletes what the kind has put on the module beside the attributes named here. The class is swapped after."""
        raise NotImplementedError

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Name below this module -> parameter, of all that is the adapter's."""
        return {name: self.get_parameter(name) for name in self.adapter_parameter_names}

    def peft_names(self) -> dict[str, tuple[str, str]]:
        """Base weight -> the adapter parameters that PEFT calls its lora_A and lora_B, by their names in the model."""
        return {
            f"{self.lora_fqn}.{weight}": (f"{self.lora_fqn}.{a}", f"{self.lora_fqn}.{b}")
            for weight, (a, b) in self.peft_factors.items()
        }

    @property
    def is_active(self) -> bool:
        """Whether the forward has to compute an update: neither merged nor disabled."""
        return self.lora_enabled and self.lora_unmerged is None

    def check_merge(self) -> None:
        """Computes what `merge` would write, and drops it.

        Raises:
            ValueError: A weight is quantized or packed, or the result is not finite on some rank.
        """
        for name in self.merged_names():
            self._add_updates(name, write=False)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the updates to the base weights, in fp32 and rounded once. The base weights are kept for `unmerge`.

        Raises:
            ValueError: See `check_merge`. The module is then as it was, as after any other error.
        """
        self.lora_unmerged = {}
        try:
            for name in self.merged_names():
                self.lora_unmerged[name] = self.get_parameter(name).detach().clone()
                self._add_updates(name, write=True)
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def _add_updates(self, name: str, *, write: bool) -> None:
        weight, fqn = self.get_parameter(name), f"{self.lora_fqn}.{name}"
        if self.packed_format:
            refused = f"{fqn} is packed ({self.packed_format}): an update cannot be merged into it. "
            raise ValueError(refused + "Merge into the original base with `lora-converter merge`.")
        if not weight.is_floating_point():
            raise ValueError(f"{fqn} is quantized ({weight.dtype}): an update cannot be merged into it.")
        local = local_part(weight)
        if not on_all_ranks(add_updates(local, self.local_updates(name), out=local if write else None), weight):
            raise ValueError(f"{fqn} would hold nan or inf in {weight.dtype} with its update: it is not merged.")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base weights back, bit for bit."""
        assert self.lora_unmerged is not None
        for name, original in self.lora_unmerged.items():
            self.get_parameter(name).copy_(original)
        self.lora_unmerged = None

    def unload(self) -> None:
        """Makes this a plain module again, of the class it was, with the weights that it has now."""
        self.remove_adapter()
        for name in ("lora_config", "lora_fqn", "lora_canonical_name", "lora_enabled", "lora_unmerged"):
            delattr(self, name)
        plain = class_below(type(self), AdaptedModule)
        self.__class__ = subclass_with(FSDPModule, plain) if isinstance(self, FSDPModule) else plain
        follow_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, super().__reduce_ex__(2))


def adapt(module: nn.Module, kind: type[M], config: LoRAConfig, *, fqn: str, canonical_name: str = "") -> M:
    """Swaps the class of `module` for one that is also of an adapted kind, and sets what all kinds have.

    Args:
        kind: An `AdaptedModule`.
        fqn: The module's name in the whole model.
        canonical_name: Its name on any host; `fqn` if left out.

    Raises:
        ValueError: See `check_forward_is_called`.
    """
    check_forward_is_called(fqn, module)
    adapted = swap_class(module, kind)
    follow_hook(adapted)
    assert isinstance(adapted, AdaptedModule)
    adapted.lora_config, adapted.lora_fqn, adapted.lora_canonical_name = config, fqn, canonical_name or fqn
    # On the instance, since graphs of torch.compile guard on an attribute's place, too.
    adapted.lora_enabled, adapted.lora_unmerged = True, None
    return cast(M, adapted)


def adapted_modules(model: nn.Module) -> Iterator[AdaptedModule]:
    """The modules of `model` that have an adapter, in the model's order."""
    return (module for module in model.modules() if isinstance(module, AdaptedModule))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for everything that is the adapters', e.g. `layers.0.attention.wq.lora_a.weight`; with
    `train_also` modules' own parameters too, e.g. `norm.weight`.

    Names are those of the whole model, also for a pipeline stage or a wrapped or compiled block of it.
    """
    adapters = ((m.lora_fqn, *entry) for m in adapted_modules(model) for entry in m.adapter_parameters().items())
    return {f"{fqn}.{name}": param for fqn, name, param in adapters} | trained_parameters(model)


def adapters_at_rest(model: nn.Module) -> list[AdaptedModule]:
    """The adapted modules, with their sharded parameters in place: FSDP2 may hold some gathered after a forward.

    Raises:
        ValueError: There is none.
    """
    reshard(model)
    adapted = list(adapted_modules(model))
    if not adapted:
        raise ValueError("The model has no LoRA adapters.")
    return adapted


def check_peft_forms(adapted: Iterable[AdaptedModule]) -> None:
    """Refuses kinds of adapters that PEFT's format has no form for.

    Raises:
        ValueError: Some of `adapted` are of such a kind; all are named.
    """
    if formless := [module for module in adapted if not (module.peft_factors or module.peft_rows)]:
        kinds = ", ".join(dict.fromkeys(module.adapter_kind for module in formless))
        names = ", ".join(module.lora_fqn for module in formless)
        raise ValueError(
            f"PEFT has no form for {len(formless)} adapted modules ({kinds}): {names}. Keep such adapters in step "
            "folders, or leave them out."
        )


def modules_of(parameters: Iterable[str], kinds: Iterable[type[AdaptedModule]]) -> list[str]:
    """The modules that adapter parameters of these names belong to, sorted; other names are left out.

    Args:
        kinds: Kinds of adapted modules whose parameters are known.
    """
    endings = {f".{name}" for kind in kinds for name in kind.adapter_parameter_names}
    return sorted({name.removesuffix(end) for name in parameters for end in endings if name.endswith(end)})


def has_stacked_experts(model: nn.Module) -> bool:
    """Whether a model keeps routed experts in parameters of three dims, (experts, out, in); packed, of one more."""
    adapters = {id(param) for param in adapter_parameters(model).values()}
    return any(p.ndim - (p.dtype is torch.uint8) == 3 and id(p) not in adapters for p in model.parameters())
