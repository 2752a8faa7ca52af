"""Swapping a module's class: the module keeps its identity, parameters and names, and gains what a mixin brings."""

import functools
import types
from typing import Any, TypeVar, cast

import torch.nn as nn

from lora_converter.names import plain_modules

M = TypeVar("M", bound=nn.Module)


def swap_class(module: nn.Module, mixin: type[M]) -> M:
    """Makes `module` an instance of `mixin` as well, in place."""
    module.__class__ = subclass_with(mixin, type(module))
    return cast(M, module)


def subclass_with(mixin: type, cls: type) -> type:
    """A class that is both, `mixin` first; one per pair, so that equal modules have equal classes."""
    return _subclass(mixin, cls)


@functools.cache
def _subclass(mixin: Any, cls: Any) -> type:
    return type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {"__module__": mixin.__module__, "_mixin": mixin})


def swapped_in(cls: type) -> list[type]:
    """The mixins of a class that swapping, and perhaps FSDP2, has made, the last one first."""
    return [vars(base)["_mixin"] for base in cls.mro() if "_mixin" in vars(base)]


def class_below(cls: type, mixin: type) -> type:
    """The class that swapping has put one of `mixin`'s on."""
    return next(base for base in cls.mro() if issubclass(vars(base).get("_mixin", object), mixin)).__bases__[1]


def unswapped(cls: type) -> type:
    """The class before any swapping."""
    while "_mixin" in vars(cls):
        cls = cls.__bases__[1]
    return cls


def reduced(module: nn.Module, usual: Any) -> Any:
    """For pickle and torch.save, which find classes by name: one that swapping has made is made again.

    Args:
        usual: What `object.__reduce_ex__(2)` says of the module.
    """
    return (_new_instance, (_recipe_of(type(module)),), *usual[2:])


def _recipe_of(cls: type) -> Any:
    """A class that `subclass_with` has made, as (mixin, recipe of the rest); others as they are."""
    mixin = vars(cls).get("_mixin")
    return (mixin, _recipe_of(cls.__bases__[1])) if mixin else cls


def _new_instance(recipe: Any) -> Any:
    """An instance of the class that `_recipe_of` has described, without its state."""
    cls: Any = _from_recipe(recipe)
    return cls.__new__(cls)


def _from_recipe(recipe: Any) -> type:
    return subclass_with(recipe[0], _from_recipe(recipe[1])) if isinstance(recipe, tuple) else recipe


def check_forward_is_called(fqn: str, module: nn.Module) -> None:
    """Refuses a module with a forward of its own on the instance, which the class's forward is never reached through.

    Raises:
        ValueError: There is one, and it is not accelerate's hook, which is followed.
    """
    own = vars(module)
    if "forward" in own and not ("_old_forward" in own and "_hf_hook" in own):
        raise ValueError(
            f"{fqn} has a forward of its own ({own['forward']!r}), which an adapter would not be reached through. Put "
            "adapters on before it is replaced, or leave the module out."
        )


def uncalled_linears(model: nn.Module) -> dict[str, str]:
    """Linears whose weight is read and which are not called, so that an adapter on them would do nothing -> by whom."""
    found: dict[str, str] = {}
    for fqn, module in plain_modules(model):
        for cls, names in _READ_WEIGHTS.items():
            if isinstance(module, cls):
                found |= {f"{fqn}.{name}" if fqn else name: cls.__name__ for name in names}
    return found


_READ_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),  # in evaluation, on its fast path
}


def follow_hook(module: nn.Module) -> None:
    """accelerate's hook calls the forward that it found, `_old_forward`: let it find that of the class of now."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)
