"""The library's calls on a model of torchtitan 0.3's, on one rank and on shards: off, merged, read and put back."""

from pathlib import Path

import torch
from jobs03 import BACKENDS, build, config, fill_b_when_loaded, start_process_group
from launch import main
from parity03 import FSDP2, TP2

from lora_converter import (
    adapter_state_dict,
    disable_adapter,
    load_adapter_state_dict,
    merge_adapter,
    unmerge_adapter,
)
from lora_converter.tensors import full_tensor

LAYOUTS = {"FSDP2": FSDP2, "TP2": TP2}


def use(folder: Path, backend: str, layout: dict[str, int]) -> None:
    """Outputs with the adapters, without, merged, and with other adapters."""
    degrees = {f"parallelism__{name}": degree for name, degree in layout.items()}
    run = build(config(folder, parallelism__spmd_backend=backend, training__steps=1, **degrees))
    fill_b_when_loaded(run)
    run.trainer.checkpointer.load()
    (model,) = run.trainer.model_parts
    model.eval()
    positions = torch.arange(128).expand(2, -1).contiguous()
    tokens = (7 * positions) % 64

    def hidden() -> torch.Tensor:
        masks = model.get_attention_masks(positions=positions)
        with torch.no_grad(), run.trainer.train_context():
            return full_tensor(model(tokens, positions=positions, attention_masks=masks)).clone()

    own = hidden()
    with disable_adapter(model):
        without = hidden()
    assert (own - without).abs().max() > 1e-2 and torch.equal(hidden(), own)
    merge_adapter(model)
    torch.testing.assert_close(hidden(), own, rtol=0, atol=1e-4)  # one product for two
    unmerge_adapter(model)
    state = {name: full_tensor(value).clone() for name, value in adapter_state_dict(model).items()}
    load_adapter_state_dict(model, {name: torch.zeros_like(value) for name, value in state.items()})
    torch.testing.assert_close(hidden(), without, rtol=0, atol=1e-5)
    load_adapter_state_dict(model, state)
    torch.testing.assert_close(hidden(), own, rtol=0, atol=1e-5)
    run.trainer.close()


CHECKS = {
    f"{layout}, {backend}": (lambda folder, b=backend, d=degrees: use(folder, b, d))
    for backend in BACKENDS
    for layout, degrees in LAYOUTS.items()
}

if __name__ == "__main__":
    main(CHECKS, start_process_group)
