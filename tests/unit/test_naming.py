"""Names and orders asked of StateDictAdapters that split, permute, transpose and combine weights."""

from typing import Any

import pytest
import torch

from lora_converter.config import LoRAConfig
from lora_converter.hf.bridge import from_peft, to_peft
from lora_converter.hf.naming import hf_linears, hf_name

OUT, IN = 12, 10
COLUMNS = torch.randperm(IN, generator=torch.Generator().manual_seed(1))


def peft_names(fqns: list[str]) -> dict[str, tuple[str, str]]:
    return {f"{fqn}.weight": (f"{fqn}.lora_a.weight", f"{fqn}.lora_b.weight") for fqn in fqns}


class Adapter:
    """A host's StateDictAdapter with one rule per weight."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, w in state_dict.items():
            match name:
                case "qkv.weight":  # one linear here, three there
                    found |= {f"attn.{n}_proj.weight": part for n, part in zip("qkv", w.split([6, 4, 2]), strict=True)}
                case "interleaved.weight":  # even rows and odd rows of one linear
                    found |= {"mlp.gate.weight": w[::2], "mlp.up.weight": w[1::2]}
                case "columns.weight":
                    found["attn.o_proj.weight"] = w[:, COLUMNS]
                case "both.weight":
                    found["attn.both.weight"] = w.flip(0)[:, COLUMNS]
                case "renamed.weight":
                    found["new.name.weight"] = w
                case "transposed.weight":
                    found["conv.weight"] = w.T
                case "mixed.weight":
                    found["mixed.weight"] = w.flatten().roll(1).view_as(w)
                case "doubled.weight":
                    found |= {"twin.0.weight": w.clone(), "twin.1.weight": w.clone()}
                case "half.weight":  # waits for another weight to be combined with
                    pass
                case _:
                    raise KeyError(name)
        return found


@pytest.mark.parametrize("fqn", ["qkv", "interleaved", "columns", "both", "renamed"])
def test_the_adapter_of_every_part_is_its_part_of_the_update_and_comes_back(fqn: str) -> None:
    """B A, split and permuted by the host as the weight would be, is what the exported factors multiply to."""
    config = LoRAConfig(rank=3, alpha=6.0)
    state = {f"{fqn}.lora_a.weight": torch.randn(3, IN), f"{fqn}.lora_b.weight": torch.randn(OUT, 3)}
    linears = {fqn: (OUT, IN)}
    peft = to_peft(Adapter(), dict(state), peft_names([fqn]), linears, config)  # type: ignore[arg-type]
    update = config.scaling * (state[f"{fqn}.lora_b.weight"] @ state[f"{fqn}.lora_a.weight"])
    expected = Adapter().to_hf({f"{fqn}.weight": update})
    assert {f"{module}.weight" for module in peft.factors} == expected.keys()
    for module in peft.factors:
        torch.testing.assert_close(peft.delta_weight(module), expected[f"{module}.weight"])
    back, _ = from_peft(Adapter(), peft, peft_names([fqn]), linears, configs={f"{fqn}.weight": config}, what="it")  # type: ignore[arg-type]
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("fqn", "message"),
    [
        ("half", "half.weight: Adapter turns it into nothing, not into the weights of linears."),
        ("unknown", "unknown.weight: Adapter cannot express it in Hugging Face's terms (KeyError('unknown.weight'))."),
        ("mixed", "mixed.weight: Adapter mixes rows and columns in mixed.weight; no adapter fits that."),
        ("transposed", "transposed.weight: Adapter mixes rows and columns in conv.weight; no adapter fits that."),
        ("doubled", f"doubled.weight: Adapter does not store each of its {OUT} rows once."),
    ],
)
def test_what_no_adapter_can_follow_is_refused_by_name(fqn: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        hf_linears(Adapter(), fqn, out_features=OUT, in_features=IN)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_split_weight_has_no_single_name() -> None:
    with pytest.raises(ValueError, match=r"qkv\.weight: Adapter splits it into attn\.q_proj, attn\.k_proj, attn\.v"):
        hf_name(Adapter(), "qkv", out_features=OUT, in_features=IN)  # type: ignore[arg-type]
