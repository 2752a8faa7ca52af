"""Where torchtitan's StateDictAdapters store routed experts, found out without a table and without their memory."""

from typing import Any

import pytest
import torch
from memory import Made
from torchtitan.models.gpt_oss import gptoss_configs
from torchtitan.models.gpt_oss.model.state_dict_adapter import GptOssStateDictAdapter
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.llama4.model.state_dict_adapter import Llama4StateDictAdapter
from torchtitan.models.qwen3 import qwen3_args
from torchtitan.models.qwen3.model.state_dict_adapter import Qwen3StateDictAdapter

from lora_converter.hf.expert_naming import hf_experts

LAYER = "layers.1.moe.experts"


def test_each_of_qwen3_30bs_experts_has_weights_of_its_own() -> None:
    shapes = {"w1": (128, 768, 2048), "w2": (128, 2048, 768), "w3": (128, 768, 2048)}
    with Made() as made:
        found = hf_experts(Qwen3StateDictAdapter(qwen3_args["30B-A3B"], None), LAYER, shapes)
    assert made.peak <= 2**20
    products = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    assert {(part.stored_name, part.expert, part.stored_shape(128), part.held[0].weight) for part in found} == {
        (f"model.layers.1.mlp.experts.{expert}.{products[weight]}.weight", expert, shapes[weight][1:], weight)
        for weight in shapes
        for expert in range(128)
    }
    assert all(h.rows is None and h.columns is None and h.place is None for part in found for h in part.held)


def test_llama4_stores_two_weights_as_one_and_all_of_them_turned_round() -> None:
    """Maverick's shapes: an index tensor of gate_up_proj would take 43 GB."""
    shapes = {"w1": (128, 8192, 5120), "w2": (128, 5120, 8192), "w3": (128, 8192, 5120)}
    with Made() as made:
        found = {part.name: part for part in hf_experts(llama4(), LAYER, shapes)}
    assert made.peak <= 2**20
    owner = "language_model.model.layers.1.feed_forward.experts"
    assert found.keys() == {f"{owner}.gate_up_proj", f"{owner}.down_proj"}
    both, down = found[f"{owner}.gate_up_proj"], found[f"{owner}.down_proj"]
    assert (both.stored_shape(128), down.stored_shape(128)) == ((128, 5120, 16384), (128, 8192, 5120))
    assert both.is_swapped and down.is_swapped and both.expert is None
    first, second = both.held
    assert (first.weight, second.weight) == ("w1", "w3") and first.place is not None and second.place is not None
    assert torch.equal(torch.cat([first.place, second.place]), torch.arange(16384, dtype=torch.int32))


def test_gpt_oss_has_the_names_of_packed_weights_and_peft_those_of_plain_ones() -> None:
    adapter = GptOssStateDictAdapter(gptoss_configs["debugmodel"], None)
    found = hf_experts(adapter, LAYER, {"mlp1_weight": (4, 12, 7), "mlp2_weight": (4, 7, 6)})
    assert [(part.name, part.stored_shape(4), part.is_swapped) for part in found] == [
        ("model.layers.1.mlp.experts.gate_up_proj", (4, 7, 12), False),
        ("model.layers.1.mlp.experts.down_proj", (4, 6, 7), False),
    ]


class Odd:
    """An adapter that does what no factors can follow."""

    hf_assets_path = None

    def __init__(self, change: str):
        self.change = change

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        w = state_dict["experts.w"]
        match self.change:
            case "reorders experts":
                return {"experts.w": w.flip(0)}
            case "turns single experts round":
                return {f"experts.{e}.w.weight": w[e].t() for e in range(w.shape[0])}
            case "adds to them":
                return {"experts.w": w + 1}
            case "drops one":
                return {f"experts.{e}.w.weight": w[e] for e in range(w.shape[0] - 1)}
        raise KeyError("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reorders experts", r"^experts\.w: Odd stores it in experts\.w in a way that no adapter fits\.$"),
        ("turns single experts round", r"^experts\.w: Odd stores it in experts\.0\.w\.weight in a way that no adapter"),
        ("adds to them", r"^experts\.w: Odd does not store each of their rows once\.$"),
        ("drops one", r"^experts\.w: Odd does not store each of their rows once\.$"),
        ("fails", r"^experts\.w: Odd cannot express it in Hugging Face's terms \(KeyError\('other'\)\)\.$"),
    ],
)
def test_what_no_factors_can_follow_is_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_experts(Odd(change), "experts", {"w": (3, 5, 4)})  # type: ignore[arg-type]


def llama4() -> Llama4StateDictAdapter:
    return Llama4StateDictAdapter(llama4_args["debugmodel"], None)
