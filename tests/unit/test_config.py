import math

import pytest

from lora_converter import LoRAConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank = 0: must be an integer of at least 1."),
        ({"rank": 2.5}, "lora.rank = 2.5: must be an integer of at least 1."),
        ({"alpha": -1.0}, "lora.alpha = -1.0: must be a finite number above 0."),
        ({"alpha": math.nan}, "lora.alpha = nan: must be a finite number above 0."),
        ({"dropout": 1.0}, "lora.dropout = 1.0: must be at least 0 and below 1."),
        ({"dropout": -0.1}, "lora.dropout = -0.1: must be at least 0 and below 1."),
        (
            {"target_modules": []},
            "lora.target_modules is empty: name at least one linear, or use 'all-linear'.",
        ),
        ({"target_modules": "wq"}, "lora.target_modules = 'wq': must be a list of non-empty strings."),
        ({"exclude_modules": [""]}, "lora.exclude_modules = ['']: must be a list of non-empty strings."),
    ],
)
def test_a_field_out_of_range_is_refused_with_its_value_and_its_range(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        LoRAConfig(**fields)
    assert str(error.value) == message


def test_scaling_is_alpha_over_rank_and_over_its_root_with_rslora() -> None:
    assert LoRAConfig(rank=16, alpha=32).scaling == 2
    assert LoRAConfig(rank=16, alpha=32, use_rslora=True).scaling == 8
