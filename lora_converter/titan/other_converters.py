"""What other model converters, a user's own say, do to the linears of a job, and what cannot work then."""

from collections.abc import Sequence

import torch.nn as nn

from lora_converter.adapted import AdaptedModule
from lora_converter.linear import linears_of
from lora_converter.names import plain_modules


def check_sharded_linears(model: nn.Module) -> None:
    """Refuses linears that torch cannot shard over a mesh: its styles look for a weight in each module below one.

    Args:
        model: As the converters before ours left it. To be tensor parallel.

    Raises:
        ValueError: There are linears with modules of their own, torchao's FakeQuantizedLinear say.
    """
    found = {fqn: linear for fqn, linear in linears_of(model).items() if any(True for _ in linear.children())}
    if found:
        fqn, linear = next(iter(found.items()))
        raise ValueError(
            f"parallelism.tensor_parallel_degree: torch cannot shard {len(found)} linears that a converter has given "
            f"modules of their own, {fqn} ({type(linear).__name__}) among them. Leave out tensor parallelism or that "
            "converter."
        )


def check_adapters_are_left(model: nn.Module, adapted: Sequence[str]) -> None:
    """Refuses a model some of whose adapters are gone; a pipeline stage need not have all modules.

    Args:
        adapted: The modules that were given adapters.

    Raises:
        ValueError: Modules are there without theirs.
    """
    modules = dict(plain_modules(model))
    lost = [fqn for fqn in adapted if fqn in modules and not isinstance(modules[fqn], AdaptedModule)]
    if lost:
        raise ValueError(
            f'{len(lost)} modules have lost their adapters to a converter that stands after "lora" in '
            f'model.converters, {lost[0]} among them. Put "lora" last.'
        )
