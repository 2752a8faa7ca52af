"""A converted model of torchtitan 0.2.2."""

from typing import Any

from lora_converter.titan.optimizer import mark_mean_gradients
from lora_converter.titan.other_converters import check_adapters_are_left
from lora_converter.titan.precision import keep_cast_weights
from lora_converter.titans import model


class LoRAModel(model.LoRAModel):
    """See `titans.model.LoRAModel`."""

    lora_flops_not_spent: int
    """Per token, of those that torchtitan counts for the whole model."""

    lora_adapted: list[str]
    """The modules of the whole model that were given adapters."""

    def init_weights(self, **kwargs: Any) -> None:
        """See `titans.model.LoRAModel`.

        Raises:
            ValueError: See `check_adapters_are_left`.
        """
        check_adapters_are_left(self, self.lora_adapted)
        super().init_weights(**kwargs)
        mark_mean_gradients(self)
        keep_cast_weights(self)
