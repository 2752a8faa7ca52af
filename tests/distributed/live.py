"""Two gloo ranks: the live API on torchtitan's model under FSDP2, TP and PP."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import BASE_CONFIG, CONFIG, Run, adapter_state, build
from launch import main
from parity import FSDP2, PP2, TP2, fill_b
from tiny_models import base_options
from torch.distributed.tensor.debug import CommDebugMode

from lora_converter import (
    LoRALinear,
    adapter_configs,
    adapter_parameters,
    adapter_state_dict,
    count_parameters,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from lora_converter.tensors import reshard

LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}


def loaded(folder: Path, layout: list[str], config: Path) -> tuple[Run, nn.Module]:
    run = build(folder, *base_options("llama3", folder.parents[2]), *layout, config=config)
    run.trainer.checkpointer.load()
    (model,) = run.trainer.model_parts
    return run, model.eval()


@torch.no_grad()
def out(model: Any) -> torch.Tensor:
    """Logits; of a pipeline's first stage hidden states, and its last is given some."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden = torch.randint(0, 320, (4, 64), generator=generator), torch.randn(4, 64, 64, generator=generator)
    result = model(hidden if model.tok_embeddings is None else tokens)
    return result.full_tensor() if hasattr(result, "full_tensor") else result


def on_rank(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def live(folder: Path, layout: list[str]) -> None:
    _, base = loaded(folder / "base", layout, BASE_CONFIG)
    expected = out(base)
    # The output head too: FSDP2 shards it as a module of its own, and swaps its class.
    run, model = loaded(folder / "lora", [*layout, "--lora.target_modules=all-linear,output"], CONFIG)
    fill_b(run)
    adapted = out(model)

    state = adapter_state_dict(model)
    reference = adapter_state(run)
    assert state.keys() == reference.keys() and all(torch.equal(state[name], reference[name]) for name in state)
    assert set(adapter_configs(model)) == {name.rsplit(".", 2)[0] for name in state}
    assert count_parameters(model).trainable == sum(value.numel() for value in state.values())

    states: list[Any] = [None, None]
    dist.all_gather_object(states, state)
    whole = {**states[0], **states[1]}
    for param in adapter_parameters(model).values():
        nn.init.zeros_(param)
    load_adapter_state_dict(model, whole, strict=len(whole) == len(state))
    assert torch.equal(out(model), adapted)
    try:
        load_adapter_state_dict(model, {name: value[:1] for name, value in state.items()})
    except ValueError as error:
        assert "have another shape" in str(error)
    else:
        raise AssertionError("accepted")
    assert torch.equal(out(model), adapted)

    # Adapters take turns as shards, without communication.
    own = {name: value.clone() for name, value in adapter_state_dict(model, full=False).items()}
    other = {name: value * -1.5 for name, value in own.items()}
    params = adapter_parameters(model)
    with CommDebugMode() as sent:
        load_adapter_state_dict(model, other)
    assert sent.get_total_counts() == 0
    turned = out(model)
    assert not torch.equal(turned, adapted)
    load_adapter_state_dict(model, own)
    assert torch.equal(out(model), adapted)
    load_adapter_state_dict(
        model, {name: value * -1.5 for name, value in whole.items()}, strict=len(whole) == len(state)
    )
    assert torch.equal(out(model), turned)
    load_adapter_state_dict(model, own)
    reshard(model)
    assert all(adapter_parameters(model)[name] is param for name, param in params.items())

    with disable_adapter(model):
        assert torch.equal(out(model), expected)
    assert not torch.equal(out(model), expected) and torch.equal(out(model), adapted)

    reshard(model)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    merge_adapter(model)
    torch.testing.assert_close(out(model), adapted, rtol=1e-4, atol=1e-4)  # as below
    unmerge_adapter(model)
    reshard(model)
    restored = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(on_rank(a), on_rank(b)) for a, b in zip(frozen, restored, strict=True))
    assert torch.equal(out(model), adapted)

    merge_and_unload(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(out(model), adapted, rtol=1e-4, atol=1e-4)  # fp32 over four layers, one product for two


CHECKS = {
    f"the live API, {name}": lambda folder, layout=layout: live(folder, layout) for name, layout in LAYOUTS.items()
}

if __name__ == "__main__":
    main(CHECKS)
